"""Rows of activations to e4m3 or int8, with a scale for every group of a row's elements."""
