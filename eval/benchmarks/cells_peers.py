"""Other ways to bring species together, on genes that both have: scVI, scANVI, PCA and Harmony."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.decomposition import PCA

from eval.cell_tables import Tables
from eval.integration import headline, latent_scores
from pretrain.cell_anchors import LEAST_SPREAD

UNKNOWN, SPECIES, TYPE = "unknown", "species", "type"
COMPONENTS = 20


def peers(shared: Mapping[str, Tables], *, seed: int, args: Any) -> Iterator[dict[str, Any]]:
    """Train and score each of them on test cells (validation cells where settings are chosen).

    Args:
        shared: split -> cells with the same genes in both species.
        seed: of what is drawn.
        args: "steps", "batch", "learning_rate" as for ours, so that all see as many cells.
    """
    known, asked = shared["train"], shared["validation" if args.tune else "test"]
    for name, make in (("PCA", _components), ("scVI", _scvi)):
        begin = time.process_time()
        for model, z in make(known, asked, seed=seed, args=args):
            seconds, begin = time.process_time() - begin, time.process_time()
            found = latent_scores(z, asked)
            yield {
                "model": f"{model} (shared genes)",
                "seed": seed,
                "cpu_s": seconds,
                "short": headline(found),
                "family": name,
                **found,
            }


def _components(
    known: Tables, asked: Tables, *, seed: int, args: Any
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Principal components of log-normalised values, then Harmony on them; both see all cells.

    Once of the values, of which the first component is the species and Harmony moves nothing; once
    of values that were standardised gene by gene within each species.
    """
    import harmonypy
    import pandas

    logging.getLogger("harmonypy").setLevel(logging.ERROR)
    both = {name: np.concatenate([known[name].values(), asked[name].values()]) for name in known}
    species = np.concatenate([np.full(len(rows), name) for name, rows in both.items()])
    table = pandas.DataFrame({SPECIES: species})
    for kind in ("", ", scaled by species"):
        parts = [_scaled(rows) if kind else rows for rows in both.values()]
        fitted = PCA(COMPONENTS, svd_solver="randomized", random_state=seed)
        low = fitted.fit_transform(np.concatenate(parts))
        yield f"PCA{kind}", _asked(low, known, asked)
        found = harmonypy.run_harmony(low, table, [SPECIES], random_state=seed, verbose=False)
        mixed = np.asarray(found.Z_corr)
        mixed = mixed if len(mixed) == len(low) else mixed.T
        yield f"Harmony{kind}", _asked(mixed, known, asked)


def _scaled(values: np.ndarray) -> np.ndarray:
    """Each gene with mean 0 and standard deviation 1; a spread below `LEAST_SPREAD` is that."""
    spread = np.maximum(values.std(0), LEAST_SPREAD)
    return np.asarray((values - values.mean(0)) / spread)


def _asked(low: np.ndarray, known: Tables, asked: Tables) -> dict[str, np.ndarray]:
    """Rows of the cells that are scored, out of known and asked ones species by species."""
    found, first = {}, 0
    for name in known:
        first += len(known[name])
        found[name] = low[first : first + len(asked[name])]
        first += len(asked[name])
    return found


def _table(tables: Tables, *, told: str) -> Any:
    """Cells as `scvi` wants them; only cells of one species have a known type."""
    import anndata
    import pandas

    types = [
        np.array([kind if name == told and kind else UNKNOWN for kind in table.types])
        for name, table in tables.items()
    ]
    species = [np.full(len(table), name) for name, table in tables.items()]
    counts = scipy.sparse.vstack([table.counts for table in tables.values()], format="csr")
    obs = pandas.DataFrame({SPECIES: np.concatenate(species), TYPE: np.concatenate(types)})
    obs.index = obs.index.astype(str)
    return anndata.AnnData(counts, obs=obs)


def _scvi(
    known: Tables, asked: Tables, *, seed: int, args: Any
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """scVI, and scANVI on top, which knows the published types of the mouse's training cells."""
    warnings.simplefilter("ignore")
    import scvi

    scvi.settings.seed = seed
    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    told = list(known)[-1]
    table, query = _table(known, told=told), _table(asked, told="")
    scvi.model.SCVI.setup_anndata(table, batch_key=SPECIES, labels_key=TYPE)
    epochs = max(round(args.steps * args.batch / table.n_obs), 1)
    model = scvi.model.SCVI(table, n_hidden=128, n_latent=10, gene_likelihood="nb")
    settings = {
        "accelerator": "cpu",
        "batch_size": args.batch,
        "train_size": 1.0,
        "enable_progress_bar": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    plan = {"lr": args.learning_rate, "n_epochs_kl_warmup": max(epochs // 4, 1)}
    model.train(max_epochs=epochs, plan_kwargs=plan, **settings)
    sizes = [len(one) for one in asked.values()]
    yield "scVI", _parts(model.get_latent_representation(query), list(asked), sizes)
    finer = scvi.model.SCANVI.from_scvi_model(model, UNKNOWN)
    finer.train(max_epochs=max(epochs // 2, 1), **settings)
    yield "scANVI", _parts(finer.get_latent_representation(query), list(asked), sizes)


def _parts(z: np.ndarray, names: list[str], sizes: list[int]) -> dict[str, np.ndarray]:
    parts = np.split(np.asarray(z, float), np.cumsum(sizes)[:-1])
    return dict(zip(names, parts, strict=True))
