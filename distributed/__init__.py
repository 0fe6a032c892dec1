"""Processes, collectives, gradient sync, checkpoints, health. (Not Dask's package of the same name.)"""
