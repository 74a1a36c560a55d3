"""How does a network add modulo p: by a few Fourier frequencies, by memory, and is that structure causally used?"""
