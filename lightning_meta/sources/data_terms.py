"""Terms of use of the data sets, by the names that data modules give them, for the cards of trained weights."""

_PHOTOGRAPHS = (
    "china.jpg and flower.jpg come with scikit-learn under CC BY 2.0 (danielbuechele and vultilion on Flickr); "
    "grace_hopper.jpg, a portrait by the US Navy in the public domain, and Minduka_Present_Blue_Pack.png, whose terms "
    "are stated by nobody, come with Matplotlib."
)
_MNIST = "MNIST: copyright of Yann LeCun and Corinna Cortes, usually given as CC BY-SA 3.0."
_DIGITS = "Scikit-learn's digits: CC BY 4.0 (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository)."
_CIFAR10 = "CIFAR-10: stated by nobody; its authors ask to cite Krizhevsky 2009."
_IMAGENET = "trained on ImageNet, whose pictures are for non-commercial research and education."
_HERSHEY = (
    "Hershey's fonts: free to use, with an acknowledgement of A. V. Hershey (US National Bureau of Standards), in any "
    "format but that of the NTIS."
)
_PYTHON = "Python's help text: Python Software Foundation licence."
_WIKIPEDIA = "Wikipedia's text of 2006: GFDL, later CC BY-SA 3.0 too."
_HIGHWAY = (
    "The highway recording: stated by nobody; the authors of Dynamic Filter Networks shared it without a licence."
)
_DRAWN = "none: a program draws the data."
_NETWORKS = "SqueezeNet 1.1", "VGG-16", "VGG-19"

# By the beginning of a data module's ``data_name``, or of a part of it after a semicolon.
TERMS = {
    "MNIST": _MNIST,
    "scikit-learn's 8x8 digits": _DIGITS,
    "CIFAR-10": _CIFAR10,
    "pictures of cifar10": _CIFAR10,
    "coloured digits over photograph patches": f"{_DIGITS} Photographs: {_PHOTOGRAPHS}",
    "bundled photographs": _PHOTOGRAPHS,
    "the authors' highway recording": _HIGHWAY,
    "highway driving": _HIGHWAY,
    "solidWhiteRight.mp4": "solidWhiteRight.mp4: MIT, Udacity (CarND-LaneLines-P1).",
    "drives over bundled photographs": _PHOTOGRAPHS,
    "drawn scenes of textured layers": _PHOTOGRAPHS,
    "2 pictures, style of shipwreck.jpg": (
        "chelsea.png: CC0, Stefan van der Walt; rocket.jpg: public domain, SpaceX; shipwreck.jpg, painted by Turner: "
        "public domain."
    ),
    **{f"{network} with ImageNet weights": f"{network}'s weights: {_IMAGENET}" for network in _NETWORKS},
    **{f"{network} with a fixed random": f"{network}'s weights: trained on nothing." for network in _NETWORKS},
    "random ": _DRAWN,
    "Omniglot": "Omniglot: MIT, Brenden Lake.",
    "letters of matplotlib's fonts": "Fonts that come with Matplotlib: DejaVu's and STIX's own free licences.",
    "ImageNet VID": "ImageNet VID: for non-commercial research and education.",
    "GOT-10k": "GOT-10k: CC BY-NC-SA 4.0.",
    "drawn videos": _PHOTOGRAPHS,
    "Penn Treebank": (
        "Penn Treebank: the Linguistic Data Consortium licenses the text, for research; the terms of Mikolov's "
        "version, used here, are stated by nobody."
    ),
    "enwik8": _WIKIPEDIA,
    "text8": _WIKIPEDIA,
    "Python's help text": _PYTHON,
    "IAM-OnDB": "IAM-OnDB: non-commercial research, after registration with its authors.",
    "words in Hershey's stroke fonts": f"{_HERSHEY} {_PYTHON}",
    "WMT'14": "WMT'14: for research; its corpora have terms of their own.",
    "Multi30k": (
        "Multi30k: stated by nobody for the sentences; the pictures that they describe are for non-commercial research "
        "and education."
    ),
    "numbers in words": _DRAWN,
}
UNKNOWN = "not known: ask where the data come from."


def terms(data: str) -> str:
    """Return the terms of the data that a record names, such as "MNIST", or ``UNKNOWN`` (a user's own data)."""
    parts = data.split("; ")
    found = [text for part in parts for name, text in TERMS.items() if part.startswith(name)]
    return " ".join(found) if len(found) == len(parts) else UNKNOWN
