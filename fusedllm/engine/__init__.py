"""From requests to tokens: pages, buckets, compiled programs and the loop that launches them."""
