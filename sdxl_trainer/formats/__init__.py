"""Model files: the diffusers folder, the original single file, and the CLIP vocabulary they share."""
