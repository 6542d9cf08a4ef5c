"""The published class splits of few-shot benchmarks.

Of CIFAR-100 (Krizhevsky 2009): CIFAR-FS (Bertinetto et al. 2019, "Meta-learning with differentiable closed-form
solvers") splits the classes at random, 64, 16 and 20. FC100 (Oreshkin et al. 2018, "TADAM: Task dependent adaptive
metric for improved few-shot learning") splits them by superclass, 12, 4 and 4 of five classes each, so that test
classes are unlike training classes.

Of FGVC-Aircraft (Maji et al. 2013; 100 variants), 102 Category Flowers (Nilsback and Zisserman 2008) and the
Describable Textures Dataset (Cimpoi et al. 2014; 47 textures): the splits at random, 70/15/15, 71/15/16 and 33/7/7, of
Meta-Dataset (Triantafillou et al. 2020, "Meta-Dataset: A dataset of datasets for learning to learn from few examples").
"""

from typing import Literal, get_args

from maml_lightning.data.datasets import Split

Benchmark = Literal["cifar-fs", "fc100", "aircraft", "flowers", "dtd"]
BENCHMARKS: tuple[Benchmark, ...] = get_args(Benchmark)

# fmt: off
SUPERCLASSES = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
# Of each benchmark the validation and test classes; all others are for training.
CIFAR_FS = {
    "val": (
        "beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish", "lamp", "maple_tree",
        "motorcycle", "otter", "sea", "shark", "television", "tractor",
    ),
    "test": (
        "baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck", "plain", "poppy", "rocket",
        "rose", "snail", "sweet_pepper", "table", "telephone", "wardrobe", "whale", "woman", "worm",
    ),
}
FC100 = {  # superclasses
    "val": ("large_carnivores", "large_omnivores_and_herbivores", "non-insect_invertebrates", "small_mammals"),
    "test": ("aquatic_mammals", "insects", "medium_mammals", "people"),
}
AIRCRAFT = {
    "train": (
        "707-320", "727-200", "737-200", "737-300", "737-500", "737-600", "737-700", "747-100", "747-200", "747-300",
        "747-400", "767-300", "777-200", "777-300", "A300B4", "A318", "A319", "A321", "A330-200", "A330-300",
        "A340-200", "A340-300", "A340-500", "A340-600", "A380", "ATR-72", "An-12", "BAE 146-200", "C-130", "C-47",
        "Cessna 172", "Cessna 208", "Cessna 525", "Cessna 560", "Challenger 600", "DC-3", "DC-6", "DH-82", "DHC-1",
        "DHC-6", "DHC-8-100", "DR-400", "Dornier 328", "E-190", "E-195", "EMB-120", "ERJ 135", "ERJ 145",
        "Embraer Legacy 600", "Eurofighter Typhoon", "F-16A/B", "F/A-18", "Falcon 2000", "Falcon 900", "Fokker 100",
        "Fokker 50", "Fokker 70", "Global Express", "Gulfstream IV", "Hawk T1", "Il-76", "MD-11", "MD-80", "MD-87",
        "Metroliner", "Model B200", "PA-28", "Saab 340", "Tu-134", "Tu-154",
    ),
    "val": (
        "737-900", "757-300", "767-200", "A310", "A320", "BAE 146-300", "CRJ-900", "DC-10", "DC-8", "DC-9-30",
        "DHC-8-300", "Gulfstream V", "SR-20", "Tornado", "Yak-42",
    ),
    "test": (
        "737-400", "737-800", "757-200", "767-400", "ATR-42", "BAE-125", "Beechcraft 1900", "Boeing 717", "CRJ-200",
        "CRJ-700", "E-170", "L-1011", "MD-90", "Saab 2000", "Spitfire",
    ),
}
DTD = {
    "train": (
        "blotchy", "braided", "bubbly", "chequered", "cobwebbed", "cracked", "crystalline", "dotted", "fibrous",
        "flecked", "freckled", "frilly", "grooved", "honeycombed", "interlaced", "lacelike", "marbled", "matted",
        "meshed", "perforated", "pitted", "pleated", "polka-dotted", "potholed", "smeared", "stained", "striped",
        "studded", "swirly", "veined", "waffled", "wrinkled", "zigzagged",
    ),
    "val": ("gauzy", "grid", "lined", "paisley", "porous", "scaly", "spiralled"),
    "test": ("banded", "bumpy", "crosshatched", "knitted", "sprinkled", "stratified", "woven"),
}
FLOWERS = {  # numbers of the classes, of 1 to 102
    "val": (10, 16, 17, 23, 26, 47, 53, 56, 57, 62, 82, 83, 86, 97, 102),
    "test": (5, 9, 15, 19, 35, 40, 41, 42, 45, 46, 65, 85, 89, 94, 96, 98),
}
# fmt: on


def benchmark_classes(benchmark: Benchmark) -> dict[Split, list[str]]:
    """The published classes of each split, by name; flowers by number."""
    if benchmark == "flowers":
        val, test = ([str(number) for number in FLOWERS[split]] for split in ("val", "test"))
        return _splits([str(number) for number in range(1, 103)], val, test)
    if benchmark in ("aircraft", "dtd"):
        table = AIRCRAFT if benchmark == "aircraft" else DTD
        return {"train": [*table["train"]], "val": [*table["val"]], "test": [*table["test"]]}
    everything = sorted(name for names in SUPERCLASSES.values() for name in names)
    if benchmark == "cifar-fs":
        return _splits(everything, [*CIFAR_FS["val"]], [*CIFAR_FS["test"]])
    val, test = (sorted(name for each in FC100[split] for name in SUPERCLASSES[each]) for split in ("val", "test"))
    return _splits(everything, val, test)


def _splits(everything: list[str], val: list[str], test: list[str]) -> dict[Split, list[str]]:
    return {"train": [name for name in everything if name not in {*val, *test}], "val": val, "test": test}
