"""What runs on workers: trials, preparations, certification, and the Ray Tune driver. The only room
of search that imports ray.
"""
