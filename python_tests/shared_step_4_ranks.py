"""Those checks of shared_step_ranks.py that 4 ranks may see otherwise than 2."""

from __future__ import annotations

import rank_processes
from shared_step_ranks import (
    check_distillation_is_that_of_one_process,
    check_queues_spread_over_ranks_change_nothing,
    check_statistics_of_every_rank_are_those_of_parts_taken_one_after_another,
    check_synchronised_steps_are_those_of_one_process,
)

CHECKS = (
    check_distillation_is_that_of_one_process,
    check_queues_spread_over_ranks_change_nothing,
    check_statistics_of_every_rank_are_those_of_parts_taken_one_after_another,
    check_synchronised_steps_are_those_of_one_process,
)

if __name__ == "__main__":
    rank_processes.main({check.__name__: check for check in CHECKS})
