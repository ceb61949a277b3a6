"""Scores and pictures of generated images.

Axes beside the legend of `cfpretrain`: F features of an image, R real images, G generated
images.
"""
