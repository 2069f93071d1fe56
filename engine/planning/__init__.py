"""The plan of a merge, made from config and file headers, with estimates of memory, traffic and time.

Only `open_models` imports torch. Knows no Ray.
"""
