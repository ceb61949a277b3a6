"""The demo of the README: real digits, their autoencoder's training, the judge and the report."""
