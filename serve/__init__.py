"""The server; of mnist/, it imports disk, images, inference, process and registry."""
