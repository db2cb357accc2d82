"""What one process decides for all of a launch."""

import os
import subprocess
import sys

from helpers import HANGING, ROOT, free_port

DECIDED = """
import os
from accelerate import PartialState
from alter.common.errors import InputError
from alter.common.process import on_main_process

def decide():
    return os.environ["RANK"]

def refuse():
    raise InputError(f"refused by {os.environ['RANK']}")

state = PartialState(cpu=True)
print(on_main_process(decide))
try:
    on_main_process(refuse)
except InputError as error:
    print(error)
state.wait_for_everyone()
state.destroy_process_group()
"""


def test_the_first_process_decides_and_all_learn_its_answer_or_its_refusal():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    processes = [subprocess.Popen([sys.executable, "-c", DECIDED], stdout=subprocess.PIPE, text=True,
                                  env={**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    printed = [process.communicate(timeout=HANGING)[0].split("\n") for process in processes]
    assert printed == [["0", "refused by 0", ""]] * 2
