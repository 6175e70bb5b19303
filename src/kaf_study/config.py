"""The settings of a training run: what they are, what is refused, and how a command gives them."""

import argparse
import math
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from kaf_study import CommandParser, InputError
from kaf_study.activations import ACTIVATION_LABELS, STUDIED, is_trained_kaf

OPTIMIZERS = ("sgd", "adam")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")  # Keras' dtype policies
INITIALIZERS = ("glorot_uniform", "he_normal", "he_uniform")
DICTIONARY_SIZE = 20  # of a Kaf unless told otherwise
N_FGSM = {"noise": 2.0, "epsilon_ramp": 0.1}  # de Jorge et al. 2022; its step is epsilon

# name -> (least, most). The upper bounds lie far above any use and keep typing errors from filling
# the memory or the century.
COUNTS = {
    "epochs": (1, 1_000),
    "batch_size": (1, 10_000),
    "train_n": (1, 1_000_000),
    "dictionary_size": (2, 1_000),
    "kwta_anneal_from": (0, 1_000),
    "kwta_anneal_every": (1, 1_000),
    "seed": (0, 2**31 - 1),
}


def is_resnet(architecture: str) -> bool:
    return architecture.startswith("resnet")


def recipe(name: str, architecture: str, activation: str) -> dict[str, Any]:
    """Settings of the training: "fast" (few epochs; momentum), "thesis" (SGD without), "adam",
    or "strong" (N-FGSM, and what has been found since to help one-step training).

    "adam" is for the light CNNs: there a KAF from a random start, whose outputs are small and reach
    the logits through no batch norm, does not leave chance level under SGD.

    Returns optimizer, lr_start, lr_min, lr_max, lr_peak, momentum, ema_momentum and, of the
    ResNets, l2 and kernel_initializer (the other networks have their own); of "strong" also
    settings that the others leave at their defaults.
    """
    common = {"lr_start": 0.0, "lr_peak": 0.5, "ema_momentum": None}

    def of_resnet(l2):
        if not is_resnet(architecture):
            return {}
        return {"l2": l2, "kernel_initializer": "glorot_uniform"}

    if name == "thesis":
        lr_min, lr_max = 0.01, 0.8
        if architecture == "vgg" and activation in STUDIED:  # an unknown one is refused later
            lr_min, lr_max = STUDIED[activation].thesis_vgg_bounds or (0.0001, 0.1)
        rates = {"lr_min": lr_min, "lr_max": lr_max}
        return common | rates | {"optimizer": "sgd", "momentum": 0.0} | of_resnet(5e-4)
    if name == "fast":
        # From lr_min a ReLU network overfits to the one-step attack before its rate has risen.
        rates = {"lr_start": 0.25, "lr_min": 0.002, "lr_max": 0.2}
        return common | rates | {"optimizer": "sgd", "momentum": 0.9} | of_resnet(2.5e-4)
    if name == "adam":
        rates = {"lr_min": 1e-4, "lr_max": 0.01}
        return common | rates | {"optimizer": "adam", "momentum": 0.9} | of_resnet(2.5e-4)
    if name == "strong":
        rates = {"lr_min": 0.0, "lr_max": 0.2, "lr_peak": 0.25}
        sgd = {"optimizer": "sgd", "momentum": 0.9, "nesterov": True} | of_resnet(2.5e-4)
        mean = {"ema_momentum": 0.995, "ema_warm": True}
        return common | rates | sgd | mean | {"label_smoothing": 0.1} | N_FGSM
    raise InputError(f"Unknown recipe {name!r}. Choose one of: fast, thesis, adam, strong.")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; everything its result depends on, but for the data itself."""

    dataset: str = "cifar10"
    architecture: str = "resnet20"
    activation: str = "kaf"
    epochs: int = 15
    batch_size: int = 128
    train_n: int | None = None  # first images of the training split; None: all
    epsilon: float = 8 / 255  # L-inf radius, images in [0, 1]; 0: ordinary training
    alpha: float = 10 / 255  # FGSM step; 1.25 epsilon as in Wong et al.
    noise: float | None = None  # of N-FGSM, in epsilons; None: the random start of Wong et al.
    epsilon_ramp: float = 0.0  # share of the training in which epsilon and alpha grow from 0
    pairing: float = 0.0  # weight of the squared distance of logits at noise and at attack
    pairing_ramp: float = 0.0  # share of the training in which that weight grows from 0
    label_smoothing: float = 0.0
    optimizer: str = "sgd"  # or adam
    lr_min: float = 0.002  # ends of the one-cycle triangular schedule
    lr_max: float = 0.2  # its peak
    lr_start: float = 0.25  # its first rate, from lr_min (0) to lr_max (1)
    lr_peak: float = 0.5  # where the peak lies, as a fraction of the training
    momentum: float = 0.9  # of SGD; Adam's beta_1
    nesterov: bool = False  # SGD only
    l2: float = 2.5e-4  # Keras l2 on every kernel; ResNets only
    kernel_initializer: str = "glorot_uniform"  # of the convolutions; ResNets only
    ema_momentum: float | None = None  # of a running mean of the weights, which is what is saved
    ema_warm: bool = False  # the running mean soon forgets the first weights; SGD only
    dictionary_size: int = DICTIONARY_SIZE  # D of the KAFs
    shapes_of: str | None = None  # model folder whose learned shapes kaf_frozen has
    kwta_anneal_from: int | None = None  # epoch from which k-WTA's ratio falls from 0.30 ...
    kwta_anneal_every: int = 2  # ... by 0.01 every so many epochs, to 0.15 if they are enough
    precision: str = "float32"  # what the layers compute in; weights and logits are float32
    seed: int = 0
    deterministic: bool = False  # TensorFlow's op determinism, slower

    def check(self) -> None:
        """Raises InputError for settings that cannot be trained, or of which one is not used."""
        try:
            msgspec.convert(asdict(self), TrainConfig)
        except msgspec.ValidationError as error:
            raise InputError(f"The settings of a training are of other types: {error}.") from None
        for name, known in (
            ("activation", tuple(ACTIVATION_LABELS)),
            ("optimizer", OPTIMIZERS),
            ("kernel_initializer", INITIALIZERS),
            ("precision", PRECISIONS),
        ):
            if (value := getattr(self, name)) not in known:
                raise InputError(
                    f"Unknown {name.replace('_', ' ')} {value!r}. "
                    f"Choose one of: {', '.join(known)}."
                )
        for name, (least, most) in COUNTS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(f"{name} lies in {least} to {most}; received {value}.")
        if not (0 <= self.epsilon <= 1 and 0 <= self.alpha <= 1):
            raise InputError(
                "epsilon and alpha lie between 0 and 255 (in 255ths); "
                f"received {self.epsilon * 255:g} and {self.alpha * 255:g}."
            )
        if not (0 <= self.momentum < 1 and 0 <= self.l2 < math.inf):
            raise InputError(
                "momentum lies in [0, 1), l2 is not negative; received "
                f"momentum={self.momentum}, l2={self.l2}."
            )
        for name in ("epsilon_ramp", "pairing_ramp", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} lies in [0, 1); received {getattr(self, name)}.")
        for name in ("noise", "pairing"):
            if not 0 <= (getattr(self, name) or 0) <= 100:
                raise InputError(f"{name} lies in 0 to 100; received {getattr(self, name)}.")
        if not (self.ema_momentum is None or 0 < self.ema_momentum < 1):
            raise InputError(f"ema_momentum lies in (0, 1); received {self.ema_momentum}.")
        if self.activation == "kaf_frozen" and self.shapes_of is None:
            raise InputError(
                "kaf_frozen has the learned shapes of a trained network; name its model folder "
                "by shapes_of."
            )
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """A setting that differs from its default but changes nothing would be a false record."""
        is_kwta = self.activation == "kwta"
        begins = self.kwta_anneal_from is not None and self.kwta_anneal_from < self.epochs
        is_attacked, is_sgd = self.epsilon > 0, self.optimizer == "sgd"
        has_warm_mean = is_sgd and self.ema_momentum is not None
        for name, is_used, where in (
            ("noise", is_attacked, "for adversarial training"),
            ("epsilon_ramp", is_attacked, "for adversarial training"),
            ("pairing", is_attacked, "for adversarial training"),
            ("pairing_ramp", self.pairing > 0, "together with pairing"),
            ("nesterov", is_sgd, "for sgd"),
            ("ema_warm", has_warm_mean, "for sgd, together with ema_momentum"),
            ("dictionary_size", is_trained_kaf(self.activation), "for KAFs that are trained"),
            ("shapes_of", self.activation == "kaf_frozen", "for kaf_frozen"),
            ("l2", is_resnet(self.architecture), "for ResNets"),
            ("kernel_initializer", is_resnet(self.architecture), "for ResNets"),
            ("kwta_anneal_from", is_kwta and begins, "for kwta, an epoch before the last"),
            ("kwta_anneal_every", is_kwta and begins, "together with kwta_anneal_from"),
        ):
            value = getattr(self, name)
            if value != getattr(TrainConfig, name) and not is_used:
                raise InputError(
                    f"{name} is {where}; received {value} with activation {self.activation}, "
                    f"architecture {self.architecture}, {self.optimizer}, epsilon "
                    f"{self.epsilon * 255:g}, {self.epochs} epochs. Leave it out."
                )


def parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    parser = CommandParser(
        prog=prog,
        description="Fast adversarial (or ordinary) training of one model folder; resumable.",
    )
    add = parser.add_argument
    defaults = TrainConfig()
    add("--dataset", default=defaults.dataset, help="cifar10 or digits")
    add("--data-dir", help="folder of CIFAR-10 (else CIFAR10_DIR, Keras' cache, download)")
    add("--architecture", default=defaults.architecture, help="light_cnn, vgg, resnet20, ...")
    add("--activation", default=defaults.activation, help=", ".join(ACTIVATION_LABELS))
    add("--epochs", type=int, default=defaults.epochs)
    add("--batch-size", type=int, default=defaults.batch_size)
    add("--train-n", type=int, help="only the first N training images")
    add(
        "--epsilon", type=float, default=8, help="L-inf radius in 255ths (%(default)g); 0: ordinary"
    )
    add("--alpha", type=float, help="step of the attack in 255ths (1.25 epsilon; N-FGSM: epsilon)")
    add("--recipe", default="fast", help="fast (default), thesis, adam or strong (see RESULTS.md)")
    for name in (
        "lr-min", "lr-max", "lr-start", "lr-peak", "momentum", "l2", "ema-momentum", "noise",
        "epsilon-ramp", "pairing", "pairing-ramp", "label-smoothing",
    ):  # fmt: skip
        add(f"--{name}", type=float, help="instead of the recipe's")
    for name in ("nesterov", "ema-warm"):
        add(f"--{name}", action=argparse.BooleanOptionalAction, help="instead of the recipe's")
    add("--kernel-initializer", help=f"instead of the recipe's: {', '.join(INITIALIZERS)}")
    add("--dictionary-size", type=int, default=defaults.dictionary_size, help="D of the KAFs (20)")
    add("--shapes-of", metavar="FOLDER", help="kaf_frozen: model folder whose shapes it has")
    add("--kwta-anneal-from", type=int, help="epoch from which k-WTA's ratio falls from 0.30")
    add(
        "--kwta-anneal-every",
        type=int,
        default=defaults.kwta_anneal_every,
        help="epochs for a fall by 0.01, down to 0.15; 15 falls are needed (2)",
    )
    add("--precision", default=defaults.precision, help=f"{', '.join(PRECISIONS)} (to compute in)")
    add("--seed", type=int, default=defaults.seed)
    add("--deterministic", action="store_true", help="bitwise repeatable, slower")
    add("--strategy", help="mirrored: all GPUs here; multiworker: the machines of TF_CONFIG")
    add("--out", required=True, help="model folder, e.g. models/cifar10_resnet20_kaf_seed0")
    add("--force", action="store_true", help="start anew, whatever the folder holds")
    return parser.parse_args(argv)


def config_of(args: argparse.Namespace) -> TrainConfig:
    """TrainConfig from the command line; 255ths become fractions here, and only here."""
    unused = {
        "--alpha": args.alpha is not None and args.epsilon == 0,
        "--data-dir": args.data_dir is not None and args.dataset == "digits",
    }
    for option, is_unused in unused.items():
        if is_unused:
            raise InputError(f"{option} changes nothing in this training; leave it out.")
    settings = recipe(args.recipe, args.architecture, args.activation)
    if args.epsilon == 0:
        settings = {name: value for name, value in settings.items() if name not in N_FGSM}
    given = {name: getattr(args, name, None) for name in TrainConfig.__dataclass_fields__}
    settings |= {name: value for name, value in given.items() if value is not None}
    step = 1.25 if settings.get("noise") is None else 1.0
    alpha = step * args.epsilon if args.alpha is None else args.alpha
    return TrainConfig(**settings | {"epsilon": args.epsilon / 255, "alpha": alpha / 255})
