"""What ``groupconv bench`` runs: our convolution beside every other way to compute the same layer.

- ``problems``: a layer, and what it costs at the very least; the layers of published networks
- ``suites``: which of them are timed, how
- ``methods``: the ways to compute a layer, ours and PyTorch's
- ``rivals``: the contenders, each a method and the question it is asked
- ``correctness``: every answer against float64, before anything is timed
- ``timing``: interleaved rounds, medians, ratios within a round
- ``machine``: the FMA peak and the copy bandwidth of this very run
- ``overhead``: what a call costs on a layer of one pixel
- ``runner``: ties these together into a Report
- ``results``: a Report as JSON and CSV, and back
- ``summary``, ``terminal``: geometric means, shares of the limits, tables
- ``plots``, ``html``: pictures (with the ``plots`` extra), and one page that works offline
- ``publish``: all of it into a folder
"""

from .problems import Problem
from .results import Report
from .rivals import CONTENDERS, Contender
from .runner import Options, run
from .suites import SUITES

__all__ = ["CONTENDERS", "SUITES", "Contender", "Options", "Problem", "Report", "run"]
