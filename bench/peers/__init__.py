"""meshd beside HyperQueue, Dask, Ray and Celery: the same work on the same cores in one run. See `__main__`."""
