from haq_lab import results as results
from haq_lab.api import evaluate as evaluate
from haq_lab.api import load as load
from haq_lab.api import load_results as load_results
from haq_lab.api import quantize as quantize
from haq_lab.api import run as run

__version__: str
