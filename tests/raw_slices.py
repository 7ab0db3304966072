"""fastMRI's knee volumes and the slices made of them, tiny but in the exact layout."""

from pathlib import Path

import numpy as np

KNEE_VOLUMES = [f"file10{n:05d}" for n in range(8)]


def fastmri_volumes(folder: Path) -> tuple[Path, Path]:
    """Volumes of 640 rows, the first of two slices, one too wide; findings of fastMRI+ beside."""
    import h5py

    rng = np.random.default_rng(0)
    for n, name in enumerate(KNEE_VOLUMES[:7]):  # the eighth is annotated, and not there
        place = folder / "knee" / ("singlecoil_val" if n % 3 == 2 else "singlecoil_train")
        place.mkdir(parents=True, exist_ok=True)
        columns = 402 if n == 5 else 372 - n
        kspace = (
            rng.normal(size=(1 if n else 2, 640, columns, 2)).astype(np.float32).view(np.complex64)
        )
        with h5py.File(place / f"{name}.h5", "w") as file:
            file["kspace"] = kspace[..., 0]
            file["reconstruction_esc"] = np.zeros((2, 320, 320), np.float32)
            file["reconstruction_rss"] = np.zeros((2, 320, 320), np.float32)
            file["ismrmrd_header"] = "<xml/>"
    lines = ["file,slice,study_level,x,y,width,height,label"]
    lines += [f"{KNEE_VOLUMES[0]},1,No,1,2,3,4,Meniscus Tear"] * 2
    lines += [f"{KNEE_VOLUMES[0]},1,No,5,6,7,8,ACL High Grade Sprain"]
    lines += [f"{KNEE_VOLUMES[1]},0,No,1,2,3,4,Cartilage - Partial Thickness loss/defect"]
    lines += [f"{KNEE_VOLUMES[2]},0,Yes,,,,,Artifact"]
    (folder / "plus").mkdir()
    (folder / "plus" / "knee.csv").write_text("\n".join(lines) + "\n")
    (folder / "plus" / "knee_file_list.csv").write_text("\n".join(KNEE_VOLUMES) + "\n")
    return folder / "knee", folder / "plus"


def fastmri_knee(folder: Path) -> Path:
    """The slices that our program writes, whose layout is the published one."""
    from mm_moe.data.prepare.fastmri_slices import write_slices

    volumes, annotations = fastmri_volumes(folder.with_name("volumes"))
    write_slices(volumes, annotations=annotations, output=folder)
    return folder
