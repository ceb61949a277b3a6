"""Scores and pictures: how good generated images are, said in numbers and shown.

Everything here is a function of arrays; nothing knows of ranks, checkpoints or the model. Axes beside the legend of
`cfpretrain`: F features of an image (its pixels, where nothing else is said), R real images, G generated images.
"""
