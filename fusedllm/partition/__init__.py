"""The policies: each says where the parts of the model run, and what that protects."""
