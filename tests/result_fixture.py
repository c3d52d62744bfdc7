"""Results of several methods and seeds on a small pair of regressions, computed with NumPy.

The numbers hang together: spectra, condition numbers and utilities of a method all come from one
backbone, so a page made from them reads like a real one.
"""

import numpy as np

from jaximm.records import result

D = 12
METHODS = ("none", "ill_only", "condition_gap", "direct_kappa", "limit")


def task(seed, *, harmful, n=300):
    """Inputs with a planted spectrum, targets along its leading directions, held-out rows too."""
    rng = np.random.default_rng([seed, int(harmful)])
    basis = np.linalg.qr(np.random.default_rng(7 + harmful).normal(size=(D, D)))[0]
    scale = np.geomspace(1.0, 0.03 if harmful else 0.08, D)
    coefficients = np.random.default_rng(3 + harmful).normal(size=D)

    def draw(rows):
        x = rng.normal(size=(rows, D)) * scale @ basis.T
        y = x @ basis @ coefficients + 1.5 * rng.normal(size=rows)
        return x, y - y.mean()

    return draw(n), draw(n // 2)


def powered(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


def backbone(method, seed, grams):
    """A linear backbone of the kind that `method` ends with."""
    best = powered(grams["primary"], -0.5)
    m = best @ grams["harmful"] @ best
    q = np.linalg.eigh(m)[1][:, ::-1]
    kappa = np.linalg.cond(grams["primary"])
    profile = np.geomspace(1.0, kappa**-0.5, D)
    limit = best @ q * profile
    limit /= np.linalg.norm(limit, 2)
    jitter = 0.2 * np.random.default_rng([seed, 5]).normal(size=(D, D))
    share = {"none": 0.0, "ill_only": 0.12, "condition_gap": 0.75, "direct_kappa": 0.97, "limit": 1}
    if method not in share:
        return np.eye(D)
    if share[method] in (0.0, 1):
        return np.eye(D) if method == "none" else limit
    u, s, vt = np.linalg.svd(limit)
    return u * s ** share[method] @ vt @ (np.eye(D) + (1 - share[method]) * jitter)


def kappa_record(values, damping, tolerance=1e-13):
    log_kappa = float(np.log(values.max() / values.min()))
    return {
        "log_kappa": log_kappa,
        "lower": log_kappa - 0.01,
        "upper": log_kappa + 0.015,
        "rank": len(values),
        "tolerance": tolerance,
        "dtype": "float64",
        "dominated_by": "damping" if values.min() < 1.5 * damping else "none",
    }


def hessian_values(gram, theta):
    return np.linalg.eigvalsh(theta.T @ gram @ theta)[::-1]


def conditioning_row(grams, theta, damping, definition):
    row = {"definition": definition}
    for name, gram in grams.items():
        damped = gram + damping[name] * np.eye(D)
        before, after = hessian_values(damped, np.eye(D)), hessian_values(damped, theta)
        row[name] = {
            "before": kappa_record(before, damping[name]),
            "after": kappa_record(after, damping[name] * 1e-3),
        }
        row[f"log_ratio_{name}"] = (
            row[name]["after"]["log_kappa"] - row[name]["before"]["log_kappa"]
        )
        row[f"damping_{name}"] = damping[name]
    damped = {name: gram + damping[name] * np.eye(D) for name, gram in grams.items()}
    whiten = powered(damped["primary"], -0.5)
    limit = (
        np.log(np.linalg.cond(whiten @ damped["harmful"] @ whiten))
        + np.log(np.linalg.cond(damped["primary"]))
        - np.log(np.linalg.cond(damped["harmful"]))
    )
    rir = row["log_ratio_harmful"] - row["log_ratio_primary"]
    return row | {
        "log_rir": rir,
        "log_rir_lower": rir - 0.05,
        "log_rir_upper": rir + 0.05,
        "log_rir_limit": limit,
        "log_fraction": rir / limit,
    }


def r_squared(train, test, theta, damping):
    (x, y), (x_test, y_test) = train, test
    f, f_test = x @ theta, x_test @ theta
    gram = f.T @ f / len(f)
    w = np.linalg.solve(gram + damping * np.trace(gram) / D * np.eye(D), f.T @ y / len(f))
    return float(1 - np.mean((f_test @ w - y_test) ** 2) / np.var(y_test))


def utility(train, held_out, theta, damping):
    def both(map_):
        return {
            "train": r_squared(train, train, map_, damping),
            "held_out": r_squared(train, held_out, map_, damping),
        }

    return {"metric": "r2", "before": both(np.eye(D)), "after": both(theta)}


def make_result(method="condition_gap", seed=0, *, experiment="house_price"):
    """One valid result, deterministic in its arguments."""
    tasks = {name: task(seed, harmful=name == "harmful") for name in ("primary", "harmful")}
    grams = [{}, {}]
    for name, (train, held_out) in tasks.items():
        for store, (x, _) in zip(grams, (train, held_out), strict=True):
            store[name] = x.T @ x / len(x)
    damping = {name: 1e-3 * float(np.trace(gram)) / D for name, gram in grams[0].items()}
    theta = backbone(method, seed, {k: v + damping[k] * np.eye(D) for k, v in grams[0].items()})
    rows = {}
    for footing, scale, text in (
        ("damped", 1.0, "kappa(K + lam I) before the backbone, lam = 1e-3 tr(K)/d"),
        ("shipped", 0.5, "half of it, in place of a damping of its own features"),
        ("pseudo_inverse", 0.0, "largest over smallest singular value above the tolerance"),
        ("reference", 1e-3, "1e-6 added to the diagonal"),
    ):
        lam = {name: scale * value for name, value in damping.items()}
        rows[footing] = {
            split: conditioning_row(gram, theta, lam, text)
            for split, gram in zip(result.SPLITS, grams, strict=True)
        }
    first, last = rows["damped"]["train"]["primary"], rows["damped"]["train"]["harmful"]
    iterative = method not in ("none", "limit")
    trajectory = []
    for step in range(0, 1501 if iterative else 1, 50):
        share = 1 - np.exp(-step / 300)
        logs = {
            name: kappas["before"]["log_kappa"] * (1 - share) + kappas["after"]["log_kappa"] * share
            for name, kappas in (("primary", first), ("harmful", last))
        }
        trajectory.append({
            "step": step, "log_kappa_primary": logs["primary"],
            "log_kappa_harmful": logs["harmful"],
            "log_ratio_harmful": logs["harmful"] - last["before"]["log_kappa"],
            "log_ratio_primary": logs["primary"] - first["before"]["log_kappa"],
            "rank_primary": D, "rank_harmful": D, "task_loss": 0.2 + 0.1 * np.exp(-step / 200),
            "scale_primary": 1.0, "scale_harmful": 1.0,
        })  # fmt: skip
    damped = {name: gram + damping[name] * np.eye(D) for name, gram in grams[0].items()}
    return {
        "schema": result.SCHEMA_VERSION,
        "experiment": experiment,
        "method": method,
        "seed": seed,
        "init": "identity",
        "config": {"method": {"name": method, "steps": 1500}, "seed": seed, "data": {"d": D}},
        "command": f"jaximm immunise {experiment} --method {method} --seed {seed} --out runs",
        "versions": {"python": "3.12.3", "jax": "0.12.0.1", "jaximm": "0.1.0"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "dtype": "float64",
        "data": {
            "name": experiment,
            "description": "Two synthetic regressions in the manner of house prices.",
            "source": "made with NumPy for the tests",
            **{
                name: {
                    "name": f"{name} regression",
                    "kind": "regression",
                    "n_train": len(train[0]),
                    "n_held_out": len(held_out[0]),
                    "d": D,
                }
                for name, (train, held_out) in tasks.items()
            },
            "inputs_shared": False,
        },
        "conditioning": rows,
        "spectra": {
            name: {
                "before": hessian_values(gram, np.eye(D)).tolist(),
                "after": hessian_values(gram, theta).tolist(),
            }
            for name, gram in damped.items()
        },
        "trajectory": trajectory,
        "utility": utility(*tasks["primary"], theta, 1e-3),
        "harmful_utility": utility(*tasks["harmful"], theta, 1e-3),
        "flags": [
            {
                "code": "kappa_rounding",
                "severity": "warning",
                "message": "Round-off decides 1 condition number, at the edge of the dtype.",
                "caps": False,
            }
        ],
        "timing": {
            "immunise_s": 4.2,
            "measure_s": 0.3,
            "total_s": 4.5,
            "steps": 1500 if iterative else 0,
            "s_per_step": 0.0028 if iterative else None,
        },
    }


def make_results(methods=METHODS, seeds=(0, 1, 2), **kwargs):
    return [make_result(method, seed, **kwargs) for method in methods for seed in seeds]


def make_deep_result(method="condition_gap", seed=0):
    """One valid result of a deep experiment: the linear one's conditioning, all else of its own."""
    found = make_result(method, seed, experiment="tiny_deep")
    moved = method != "none"
    for task, classes in (("primary", 4), ("harmful", 6)):
        found["data"][task] |= {"name": f"{task} images", "kind": "classes", "classes": classes}
    groups = {}
    for split in result.SPLITS:
        ratios = found["conditioning"]["pseudo_inverse"][split]
        groups[split] = {"groups": 20, "rows": 100} | {
            key: {"mean": 0.5 * ratios[key], "sd": 0.25 + 0.1 * seed}
            for key in ("log_ratio_harmful", "log_ratio_primary", "log_rir")
        }

    def quality(before, after):
        return {"metric": "accuracy", "before": before, "after": after if moved else before}

    return found | {
        "init": "pretrained",
        "dtype": "float32",
        "backbone": {
            "model": "mlp",
            "trained": "layers.1",
            "hash_before": "a" * 64,
            "hash_after": ("b" if moved else "a") * 64,
        },
        "groups": groups,
        "logits_change": 2e-6,
        "utility": quality(
            {"train": 0.91, "held_out": 0.87}, {"train": 0.905, "held_out": 0.86}
        ),
        "harmful_utility": quality(
            {"train": 0.75, "held_out": 0.70}, {"train": 0.73, "held_out": 0.65}
        ),
    }  # fmt: skip
