"""The server; of mnist/, it imports conformal, disk, images, inference, process and registry."""
