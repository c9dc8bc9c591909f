import os

# The models are tiny: a second thread does not help, and on a busy machine the two wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
