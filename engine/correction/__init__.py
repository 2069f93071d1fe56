"""Solving the layers of a merged model block by block, so that on samples they compute what the experts compute."""
