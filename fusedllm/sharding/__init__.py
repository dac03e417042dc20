"""Models on several devices: which axis is split over which, how weights get there, and programs that run there."""
