"""What `sdxl sample` and the pictures during training are made of: requests, samplers, drawing, files, grids."""
