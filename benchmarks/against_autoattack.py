"""Our attacks against their authors' PyTorch code, image by image, on one ResNet20 of `models/`.

    python benchmarks/against_autoattack.py export MODEL_FOLDER FILE.npz --n 200
    TORCH_PYTHON benchmarks/against_autoattack.py theirs FILE.npz
    python benchmarks/against_autoattack.py ours FILE.npz
    python benchmarks/against_autoattack.py compare FILE.npz

`export` writes the network's weights, its logits and the first N test images; `theirs` builds the
same network in PyTorch (an environment with torch and pyautoattack, the authors' package) and runs
the members of standard AutoAttack, each on what the ones before left standing; `ours` does the same
here. Both write FILE.theirs.npz or FILE.ours.npz: by which member each image fell, and seconds.
`ours` ends with `rapid` on the same images, so that its seconds stand beside AutoAttack's in one
run. `compare` puts into against_autoattack.json what of it agrees.
With `--fab-norms TARGETS`, FAB-T runs alone instead, on all images that are right when clean, and
its smallest perturbation towards each of so many targets is kept.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

import numpy as np

EPSILON = 8 / 255
MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square")


def export(folder: Path, file: Path, n: int) -> None:
    """Weights in the order in which the layers were made, images, labels, logits."""
    import kaf_study  # noqa: F401, I001 - first: it sets what TensorFlow reads
    import keras

    from kaf_study.datasets import load_test

    model = keras.saving.load_model(folder / "model.keras", compile=False)
    arrays = {}
    for kind in ("conv2d", "batch_normalization", "logits"):
        layers = [layer for layer in model.layers if re.fullmatch(rf"{kind}(_\d+)?", layer.name)]
        layers.sort(key=lambda layer: int(re.search(r"_(\d+)$|$", layer.name)[1] or 0))
        for i, layer in enumerate(layers):
            for weight in layer.weights:
                arrays[f"{kind}/{i}/{weight.name}"] = keras.ops.convert_to_numpy(weight)
    x, y = (part[:n] for part in load_test("cifar10"))
    logits = np.concatenate(
        [np.array(model(x[i : i + 100], training=False)) for i in range(0, n, 100)]
    )
    activation = next(name for name in ("relu", "swish") if f"resnet20_{name}_seed" in folder.name)
    np.savez(file, x=x, y=y, logits=logits, folder=str(folder), activation=activation, **arrays)


def torch_network(kept):
    """The network in PyTorch: function of images (B, 3, 32, 32)."""
    import torch
    from torch.nn import functional as F

    tensors = {name: torch.from_numpy(kept[name]) for name in kept.files if "/" in name}
    activation = {"relu": F.relu, "swish": F.silu}[str(kept["activation"])]
    convolutions, norms = iter(range(10**6)), iter(range(10**6))

    def conv_parameters():
        i = next(convolutions)
        kernel = tensors[f"conv2d/{i}/kernel"].permute(3, 2, 0, 1).contiguous()
        return kernel, tensors[f"conv2d/{i}/bias"]

    def norm_parameters():
        i = next(norms)
        names = ("moving_mean", "moving_variance", "gamma", "beta")
        return [tensors[f"batch_normalization/{i}/{name}"] for name in names]

    def conv(x, parameters, stride):
        # Keras' "same" pads an even image below and to the right only, where the stride is 2.
        x = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        return F.conv2d(x, *parameters, stride=stride)

    def norm(x, parameters):
        return F.batch_norm(x, *parameters, training=False, eps=1e-3)

    stem, stem_norm = conv_parameters(), norm_parameters()
    blocks = []
    for index in range(9):
        stride = 2 if index in (3, 6) else 1
        skip = conv_parameters() if stride == 2 else None
        blocks.append(
            (
                stride,
                skip,
                conv_parameters(),
                norm_parameters(),
                conv_parameters(),
                norm_parameters(),
            )
        )

    def network(x):
        x = activation(norm(conv(x, stem, 1), stem_norm))
        for stride, skip, conv1, norm1, conv2, norm2 in blocks:
            h = activation(norm(conv(x, conv1, stride), norm1))
            h = conv(h, conv2, 1)
            x = activation(norm(h + (conv(x, skip, 2) if skip else x), norm2))
        return x.mean(dim=(2, 3)) @ tensors["logits/0/kernel"] + tensors["logits/0/bias"]

    return network


def x_parts(index, batch_size):
    """Index (M,) in parts of about one size, at most `batch_size`."""
    return np.array_split(index, -(-len(index) // batch_size))


class Members:
    """Runs members, of `all_names`, one after the other; keeps who felled an image, and seconds."""

    def __init__(self, file, n, all_names=MEMBERS):
        self.file = file
        self.all_names = all_names
        self.felled_by = np.full(n, "", "<U8")
        self.seconds = {}

    def run(self, names, standing, attack):
        """attack(name, index) -> fell, of the images at index (M,) that stand; standing (N,)."""
        standing = standing.copy()
        for name in names:
            index = np.flatnonzero(standing)
            began = time.monotonic()
            fell = attack(name, index)
            self.seconds[name] = time.monotonic() - began
            self.felled_by[index[fell]] = name
            standing[index[fell]] = False
            print(f"{name}: {len(index)} attacked, {fell.sum()} fell, {self.seconds[name]:.0f} s")
            seconds = np.array([self.seconds.get(name, np.nan) for name in self.all_names])
            np.savez(self.file, felled_by=self.felled_by, seconds=seconds)


def theirs(file: Path, n: int, names, fab_targets: int, batch_size: int, threads: int) -> None:
    import torch
    from pyautoattack import AutoAttack

    torch.set_num_threads(threads)
    kept = np.load(file)
    network = torch_network(kept)
    x = torch.from_numpy(kept["x"][:n]).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(kept["y"][:n]).long()
    with torch.no_grad():
        logits = torch.cat([network(part) for part in x.split(100)]).numpy()
    print(f"logits differ from Keras' by at most {np.abs(logits - kept['logits'][:n]).max():.1e}")
    right = logits.argmax(axis=1) == kept["y"][:n]  # by its own logits
    adversary = AutoAttack(network, eps=EPSILON, seed=0, version="standard")
    adversary.apgd.loss = "ce"
    adversary.fab.targeted = True
    attacks = {
        "apgd-ce": adversary.apgd,
        "apgd-t": adversary.apgd_targeted,
        "fab-t": adversary.fab,
        "square": adversary.square,
    }

    def attack(name, index):
        for one in attacks.values():
            one.seed = 0
        fell = []
        for part in x_parts(index, batch_size):
            x_adv = attacks[name].perturb(x[part], y[part])
            with torch.no_grad():
                fell.append((network(x_adv).argmax(dim=1) != y[part]).numpy())
        return np.concatenate(fell)

    if not fab_targets:
        Members(file.with_suffix(".theirs.npz"), len(x)).run(names, right, attack)
        return
    index, norms = np.flatnonzero(right), []
    began = time.monotonic()
    with torch.no_grad():
        for target in range(fab_targets):
            adversary.fab.target_class = target + 2
            found = torch.cat(
                [
                    adversary.fab.attack_single_run(x[part], y[part], is_targeted=True)
                    for part in x_parts(index, batch_size)
                ]
            )
            norms.append((found - x[index]).abs().amax(dim=(1, 2, 3)).numpy())
            norms[-1][norms[-1] == 0] = np.inf  # nothing was found
            seconds = time.monotonic() - began
            np.savez(file.with_suffix(".theirs.npz"), norms=norms, index=index, seconds=seconds)


def ours(file: Path, n: int, names, fab_targets: int, batch_size: int) -> None:
    import kaf_study  # noqa: F401, I001 - first: it sets what TensorFlow reads
    import keras

    from kaf_study.attacks.classifier import CompiledClassifier
    from kaf_study.attacks.fab import FAB
    from kaf_study.attacks.registry import AttackSettings
    from kaf_study.fused_layers import inference_twin

    kept = np.load(file)
    model = keras.saving.load_model(Path(str(kept["folder"])) / "model.keras", compile=False)
    x, y = kept["x"][:n], kept["y"][:n].astype("int64")
    classifier = CompiledClassifier(inference_twin(model, x[:2]), 10, (32, 32, 3))
    right = right_of(kept, n)
    settings = dict(zip(MEMBERS, AttackSettings("autoattack", EPSILON).members, strict=True))
    rapid = {member.attack: member for member in AttackSettings("rapid", EPSILON).members}
    settings |= rapid

    def run(attack, index, restart):
        return attack.run(x[index], y[index], index, restart, seed=0, batch_size=batch_size)

    def attack(name, index):
        made, fell = settings[name].made_for(classifier), np.zeros(len(index), bool)
        for restart in range(1, settings[name].restarts + 1):
            fell[~fell] = run(made, index[~fell], restart).fell
        return fell

    if not fab_targets:
        Members(file.with_suffix(".ours.npz"), len(x)).run(names, right, attack)
        Members(file.with_suffix(".rapid.npz"), len(x), rapid).run(rapid, right, attack)
        return

    class Recording(FAB):
        """Keeps the smallest perturbations before the final search, which theirs has not."""

        def propose(self, state, found, iteration):
            super().propose(state, found, iteration)
            if iteration == self.iterations:
                norms[-1].append(state["best_norm"])

    index, norms = np.flatnonzero(right), []
    began = time.monotonic()
    for target in range(fab_targets):
        norms.append([])
        run(Recording(classifier, epsilon=0.0, steps=100), index, target + 1)
        together = np.array([np.concatenate(one) for one in norms])
        seconds = time.monotonic() - began
        np.savez(file.with_suffix(".ours.npz"), norms=together, index=index, seconds=seconds)


def compare(file: Path, into: Path) -> None:
    """Prints what agrees, and puts it under the model's name into the JSON file `into`."""
    from kaf_study.records import hardware

    kept = np.load(file)
    ours, theirs = (np.load(file.with_suffix(f".{side}.npz")) for side in ("ours", "theirs"))
    if "felled_by" in ours:
        of, found = "verdicts", of_verdicts(kept, ours["felled_by"], theirs["felled_by"])
        rapid = np.load(file.with_suffix(".rapid.npz"))
        found["rapid"] = {
            "stand": stand(kept, rapid["felled_by"]),
            "seconds": rapid["seconds"].round(1).tolist(),
        }
    else:
        index, a, b = ours["index"], ours["norms"], theirs["norms"]
        of, found = "perturbations of fab-t", of_norms(index, a, b)
    seconds = [np.atleast_1d(side["seconds"]).round(1).tolist() for side in (ours, theirs)]
    date = time.strftime("%Y-%m-%d")
    found |= {"seconds": by_side(*seconds), "machine": hardware(), "date": date}
    records = json.loads(into.read_text()) if into.exists() else {}
    of_network = records.setdefault(Path(str(kept["folder"])).name, {})
    if of_network.get(of, {}).get("images", 0) > found["images"]:
        of += f" of the first {found['images']}"  # more have been looked at before
    of_network[of] = found
    into.write_text(json.dumps(records, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def by_side(ours, theirs) -> dict:
    return {"ours": ours, "theirs": theirs}


def right_of(kept, n):
    """Whether each of the first n images is right when clean, (n,) bool."""
    return kept["logits"][:n].argmax(axis=1) == kept["y"][:n]


def stand(kept, felled_by) -> str:
    """The images that stand, where felled_by (N,) names what felled one."""
    return " ".join(map(str, np.flatnonzero(right_of(kept, len(felled_by)) & (felled_by == ""))))


def of_verdicts(kept, ours, theirs) -> dict:
    """Which of N images stand, and how many fell to whom, here and there.

    differ: {image: [by whom here, by whom there]}.
    """
    differ = np.flatnonzero((ours == "") != (theirs == ""))
    return {
        "images": len(ours),
        "right when clean": int(right_of(kept, len(ours)).sum()),
        "stand": by_side(stand(kept, ours), stand(kept, theirs)),
        "felled by": {
            member: [int((side == member).sum()) for side in (ours, theirs)] for member in MEMBERS
        },
        "same verdict": int(len(ours) - len(differ)),
        "differ": {int(i): [ours[i], theirs[i]] for i in differ},
    }


def of_norms(index, ours, theirs) -> dict:
    """Smallest perturbations (targets, N) of FAB, inf where none was found."""
    both = np.isfinite(ours) & np.isfinite(theirs)
    differ = (ours <= EPSILON) != (theirs <= EPSILON)
    ratios = np.quantile(ours[both] / theirs[both], (0, 0.05, 0.5, 0.95, 1))
    return {
        "targets": len(ours),
        "images": len(index),
        "found by both": int(both.sum()),
        "found by one": int((np.isfinite(ours) != np.isfinite(theirs)).sum()),
        "ours / theirs, quantiles 0, 5, 50, 95, 100 %": ratios.round(4).tolist(),
        "within epsilon on one side only": [
            [int(t) + 1, int(index[i]), *(round(255 * float(d[t, i]), 3) for d in (ours, theirs))]
            for t, i in np.argwhere(differ)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("export", "theirs", "ours", "compare"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--members", nargs="+", default=MEMBERS, choices=MEMBERS)
    parser.add_argument("--fab-norms", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--into", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    given = parser.parse_args()
    match given.what:
        case "export":
            export(*given.paths, given.n)
        case "theirs":
            theirs(
                *given.paths,
                given.n,
                given.members,
                given.fab_norms,
                given.batch_size,
                given.threads,
            )
        case "ours":
            ours(*given.paths, given.n, given.members, given.fab_norms, given.batch_size)
        case "compare":
            compare(*given.paths, given.into)


if __name__ == "__main__":
    main()
