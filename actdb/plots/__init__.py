"""Pictures of a database: functions that take a `Database` and return a matplotlib `Figure`, or an HTML page.

    figure = actdb.plots.pattern(db, 17, layer=1, head=5)
    actdb.plots.save_figure(figure, Path("l1h5.png"))

`actdb plot` draws the same from the command line. Figures are made by matplotlib's object interface: no global state,
no display. A notebook shows them after `%matplotlib inline`.
"""

from actdb.plots.attention import pattern, patterns_figure
from actdb.plots.head_grid import heads
from actdb.plots.logit_lens import lens
from actdb.plots.neuron import neurons
from actdb.plots.page import attention_page
from actdb.plots.picture import fill_template, save, save_figure, save_page
from actdb.plots.style import COLOURS, DIVERGING
from actdb.plots.token_line import tokens, tokens_page

__all__ = [
    "COLOURS",
    "DIVERGING",
    "attention_page",
    "fill_template",
    "heads",
    "lens",
    "neurons",
    "pattern",
    "patterns_figure",
    "save",
    "save_figure",
    "save_page",
    "tokens",
    "tokens_page",
]
