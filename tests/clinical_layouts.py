"""Tiny clinical downloads in their raw layouts; every value is made up."""

import json
from pathlib import Path

import numpy as np

ATLAS = "BLSA_SPGR+MPRAGE_averagetemplate_muse_seg_DS222.nii.gz"


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def put_csv(path: Path, heading: str, *lines) -> Path:
    rows = [",".join("" if cell is None else str(cell) for cell in line) for line in lines]
    return put(path, "\n".join([heading, *rows]) + "\n")


def ptid(n: int) -> str:
    return f"{n % 7:03d}_S_{n:04d}"


def atlas(folder: Path, *, voxels: int = 84) -> np.ndarray:
    """A brain of 6 x 7 x 5 with so many voxels of grey matter."""
    import nibabel

    labels = np.zeros((6, 7, 5), np.int16)
    labels.reshape(-1)[np.random.default_rng(0).permutation(210)[:voxels]] = 150
    labels.reshape(-1)[(labels == 0).reshape(-1).nonzero()[0][:20]] = 250
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / ATLAS)
    return labels == 150


def adni(folder: Path, *, count: int = 40) -> Path:
    """The merged files: gaps in every modality, two scans of one participant, a failed scan."""
    import anndata

    rng = np.random.default_rng(1)
    names = [ptid(n) for n in range(count)]
    labels = [n % 3 for n in range(count)]
    put_csv(
        folder / "label.csv", "PTID,DIAGNOSIS", *zip(names, (n + 1 for n in labels), strict=True)
    )
    atlas(folder / "image")
    scanned = names[: count - 8]
    scans = [f"{scanned[0]}_2012-03-04", *(f"{name}_2010-01-31" for name in scanned)]
    maps = rng.gamma(2.0, 50.0, (len(scans), 84)).astype(np.float32)
    maps[5] = 0  # its processing failed
    np.save(folder / "image" / "ADNI_G.npy", maps)
    put(folder / "image" / "ADNI_subj.txt", "\n".join(scans) + "\n")
    counts = rng.integers(0, 3, (count - 5, 200)).astype(np.float32)
    counts[rng.random(counts.shape) < 0.02] = np.nan
    genes = anndata.AnnData(counts)
    genes.obs_names = names[5:]
    (folder / "genomic").mkdir()
    genes.write_h5ad(folder / "genomic" / "genomic_merged.h5ad")
    for part, width, start in (("clinical", 60, 0), ("biospecimen", 20, 12)):
        values = rng.normal(size=(count, width)).round(4)
        heading = ",".join(["PTID", *(f"{part[:4].upper()}{n}" for n in range(width))])
        if part == "clinical":
            heading = heading.replace("CLIN59", "PTCOGBEG_2005")
        lines = [(names[n], *values[n]) for n in range(start, count)]
        put_csv(folder / part / f"{part}_merged.csv", heading, *lines)
    return folder


def adni_split(folder: Path, **lists) -> Path:
    return put(folder / "PTID_splits.json", json.dumps(lists))


def adni_study(folder: Path, *, count: int = 20) -> Path:
    """The study's own tables, with the dates that exports carry in their names."""
    names = [ptid(n) for n in range(count)]
    visits = [(n, name, v, n % 3 + 1) for n, name in enumerate(names) for v in ("bl", "m12")]
    put_csv(folder / "DXSUM_05Jun2024.csv", "RID,PTID,VISCODE,DIAGNOSIS", *visits)
    common = "RID,PTID,PHASE,UPDATE_STAMP"
    rows = [(n, name, "ADNI2", "2012-01-05") for n, name in enumerate(names)]
    own = {
        "MEDHIST": ("MHPSYCH,MH2NEURL", lambda n: (n % 2, (n + 1) % 2)),
        "NEUROEXM": ("NXVISUAL,NXGAIT", lambda n: (1 + n % 2, 1 + n % 2)),
        "PTDEMOG": ("PTGENDER,PTDOBYY,PTCOGBEG", lambda n: (1 + n % 2, 1930 + n, 2001 + n % 4)),
        "RECCMEDS": (
            "CMMED",
            lambda n: ("Aricept" if n % 3 == 2 else ("Aspirin", "Zocor")[n % 2],),
        ),
        "VITALS": ("VSWEIGHT,VSBPSYS", lambda n: (60 + n, -4 if n == 1 else 120 + n)),
    }
    for table, (heading, make) in own.items():
        lines = [(*row, *make(n)) for n, row in enumerate(rows)]
        put_csv(folder / "clinical" / f"{table}.csv", f"{common},{heading}", *lines)
    apoe = [
        (n, name, "ADNI2", "2012-01-05", "3/4" if n % 2 else "3/3") for n, name in enumerate(names)
    ]
    put_csv(
        folder / "biospecimen" / "APOERES.csv",
        f"{common.replace('PHASE', 'PHASE')},GENOTYPE",
        *((n, p, f, s, g) for n, p, f, s, g in apoe),
    )
    csf = [("ADNI2", n, "2012-02-01", ">1700" if n == 0 else 500 + 10 * n) for n in range(count)]
    csf.append(("ADNI3", 999, "2012-02-01", 700))
    put_csv(
        folder / "biospecimen" / "UPENNBIOMK_ROCHE_ELECSYS.csv",
        "PHASE,RID,UPDATE_STAMP,ABETA42",
        *csf,
    )
    return folder


def plink(folder: Path, people: list[str], counts_ND: np.ndarray, *, name: str = "genomic") -> Path:
    """Counts {0, 1, 2, 3 = not called} as .bed, .bim, .fam, bit by bit as the format says."""
    folder.mkdir(parents=True, exist_ok=True)
    bits_of = {2: "00", 3: "01", 1: "10", 0: "11"}
    body = bytearray([0b01101100, 0b00011011, 1])
    for counts_N in counts_ND.T:
        for start in range(0, len(counts_N), 4):
            four = [bits_of[int(count)] for count in counts_N[start : start + 4]]
            body.append(int("".join(reversed(four)), 2))
    (folder / f"{name}.bed").write_bytes(bytes(body))
    put(folder / f"{name}.fam", "".join(f"0 {one} 0 0 0 -9\n" for one in people))
    put(
        folder / f"{name}.bim",
        "".join(f"1 rs{n} 0 {n + 1} A G\n" for n in range(counts_ND.shape[1])),
    )
    return folder
