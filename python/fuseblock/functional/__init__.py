"""What users call: functions with argument checks, shapes and equations; the modules of `fuseblock.nn` stand on them."""

from ._lstm import lstm, lstm_cell, lstm_gates, lstm_recurrence

__all__ = ["lstm", "lstm_cell", "lstm_gates", "lstm_recurrence"]
