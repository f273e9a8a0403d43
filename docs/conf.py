"""Sphinx configuration. Needs no network: links to torch and Python are made where BILEVEL_INTERSPHINX=1 allows one."""

import os
import sys
from pathlib import Path

import bilevel

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "bilevel"
copyright = "the bilevel authors"
author = "the bilevel authors"
version = release = bilevel.__version__

extensions = [
    "mathml",
    "statuses",
    "backlinks",
    "sitemap",
    "sidebar",
    "typography",
    "docstrings",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
# The gallery's pages are made of the scripts in examples/. They are run, and their figures drawn, by `make gallery` alone.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "plot_gallery": os.environ.get("BILEVEL_GALLERY", "0") == "1",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "write_computation_times": False,
    "reference_url": {"bilevel": None},
    "within_subsection_order": "FileNameSortKey",
}
# Elsewhere the types of others have no link, and nitpick_ignore_regex names them.
if os.environ.get("BILEVEL_INTERSPHINX", "0") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "scipy": ("https://docs.scipy.org/doc/scipy", None),
    }
html_math_renderer = "mathml"
myst_enable_extensions = ["colon_fence", "dollarmath"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates", "_static"]
autosummary_generate = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_baseurl = os.environ.get("BILEVEL_DOCS_URL", "")  # for the sitemap
html_title = f"bilevel {release}"

nitpicky = True
# What has no page of ours to link to: torch, the standard library, and words that numpy-style types are written in.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|nn|np|numpy|scipy|sklearn|collections|abc|typing|pathlib|enum|optim|rich|hypothesis|st)(\..*)?",
    ),
    (
        r"py:.*",
        r"(Tensor|Module|Any|Callable|Sequence|Mapping|Iterator|T|S|OuterTree|Path|optional|callable|SystemExit|Literal|Self)",
    ),
    (
        r"py:.*",
        r"(InnerSolverLike|LinearSolverLike|OnFailure|Decorator|Auto|Hyperparameters|TreeSpec|PyTree|Table|Console|Policy|Figure|OptimizerLike|Reference)",
    ),
    (r"py:.*", r"(InnerSolverLike|LinearSolverLike|OnFailure|bilevel\..*\._.*|bilevel\._.*|bilevel\.tolerance\.Auto)"),
    # What the solvers are made of.
    (r"py:.*", r"bilevel\.solvers\.(judging|constrained|composite|programs|parts)\..*"),
    (r"py:class", r".*[ \[\]|(,].*"),
    (r"py:obj", r".*"),
    # Aliases of types, bases that are not public, and option dictionaries of signatures: they have no page.
    (
        r"py:class",
        r"(OptimizerLike|Backend|Reference|Loss|HessianChoice|ArgminOptions|LayerOptions|LeastSquaresOptions|LinearOptions|Approximation)",
    ),
    (r"py:class", r"bilevel\.solvers\.bracketing\.Bracketing|bilevel\.layers\.differentiation\.(BySteps|Taken)"),
    # Type variables and private types of ours in signatures.
    (r"py:class", r"bilevel\..*\.T|T|bilevel\.tolerance\.Target|RadauBound|bilevel\.(equations|replay)\..*"),
    # Fields named from their own class's docstring, which its parameters document.
    (
        r"py:attr",
        r"value|corrected_value|multipliers|active|report|error_bound|distinct|threshold|meaning|remedy|Pass\..*|bilevel\.reports\.Basis\..*",
    ),
]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"show-inheritance": False}
napoleon_google_docstring = False
napoleon_use_rtype = False

doctest_global_setup = "import torch, bilevel"
# The pages' own examples are in directives. Those of docstrings run where their names are, by `make doctest`.
doctest_test_doctest_blocks = ""
