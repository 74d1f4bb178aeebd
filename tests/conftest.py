"""Settings that every test shares: quiet frameworks, the same few examples on every run."""

import os

try:
    import hypothesis
except ImportError:  # where a GPU is, and only the tests in need of one run
    hypothesis = None

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Without a deadline: the first example of a shape compiles. The same examples on every run, so that
# a failure is seen by all; `make fuzz` looks further.
if hypothesis is not None:
    settings = hypothesis.settings
    settings.register_profile("steady", deadline=None, derandomize=True, max_examples=50)
    settings.register_profile("fuzz", deadline=None, max_examples=2000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_addoption(parser):
    parser.addoption(
        "--pure-python",
        action="store_true",
        help="test as on a machine where the native library was not built",
    )


def pytest_configure(config):
    if config.getoption("--pure-python"):
        from normwise.kernels import library

        library.path = lambda: None
