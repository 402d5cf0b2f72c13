"""The server; imports only mnist.images, mnist.inference and mnist.registry."""
