"""Targets of the experts, losses, gradients of the merged weights, optimiser steps, importance and chunks."""
