"""The arithmetic of clustering: arrays in, NamedTuples out. No files, no names of tensors, no logging."""
