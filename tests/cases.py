from packattn.selftest import *  # noqa
from packattn.selftest import run_on, run
