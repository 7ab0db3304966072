"""TCGA lung adenocarcinoma: five modalities of a patient, with the gaps that nature left.

Files: `gene_expression.parquet`, `mirna.parquet`, `protein_rppa.parquet`, `mutation.parquet` (a
column `patient`, then numbers) and `clinical.csv`. Of 522 patients about 515, 447, 364 and 569 have
the four omics tables. Expression counts enter as log2(x + 1); every column but the mutations' zeros
and ones is standardised over the training patients.

Clinical inputs are a fixed list of what is known at diagnosis. What follows the outcome is never an
input of any task, and for each task what its label is made of is taken away besides (`leaks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from mm_moe.data.reading import reading
from mm_moe.data.schema import CLINICAL_BINARY, CLINICAL_CLASSES, SINGLE_LABEL, SURVIVAL
from mm_moe.data.sets.emoji import find_file
from mm_moe.data.sets.patients import (
    PatientData,
    Patients,
    check_choice,
    check_whole,
    fold_splits,
    folds,
    table_entry,
    vectors,
)
from mm_moe.data.standardise import (
    CATEGORICAL,
    NUMERIC,
    TableEncoder,
    plain_numbers,
    standardised,
)
from mm_moe.errors import ConfigError, DataError

FOLDS = 5
LARGEST = float(np.finfo(np.float32).max)
OMICS = {  # modality -> file, and whether its numbers are counts
    "gene": ("gene_expression.parquet", True),
    "mirna": ("mirna.parquet", True),
    "protein": ("protein_rppa.parquet", False),
    "mutation": ("mutation.parquet", False),
}
MODALITIES = (*OMICS, "clinical")
BARCODE, SMOKING, STAGE = (
    "bcr_patient_barcode",
    "tobacco_smoking_history_indicator",
    "ajcc_pathologic_tumor_stage",
)
FOLLOWED, DEATH = ("vital_status", "last_contact_days_to"), "death_days_to"
DIAGNOSIS = {  # clinical columns that are known at diagnosis
    "gender": CATEGORICAL,
    "race": CATEGORICAL,
    "ethnicity": CATEGORICAL,
    "history_other_malignancy": CATEGORICAL,
    "anatomic_organ_subdivision": CATEGORICAL,
    "location_lung_parenchyma": CATEGORICAL,
    "histologic_diagnosis.1": CATEGORICAL,
    STAGE: CATEGORICAL,
    "ajcc_tumor_pathologic_pt": CATEGORICAL,
    "ajcc_nodes_pathologic_pn": CATEGORICAL,
    "ajcc_metastasis_pathologic_pm": CATEGORICAL,
    "kras_mutation_found": CATEGORICAL,
    "egfr_mutation_status": CATEGORICAL,
    SMOKING: CATEGORICAL,
    "tobacco_smoking_pack_years_smoked": NUMERIC,
    "age_at_initial_pathologic_diagnosis": NUMERIC,
    "fev1_percent_ref_prebroncholiator": NUMERIC,
    "fev1_fvc_ratio_prebroncholiator": NUMERIC,
    "carbon_monoxide_diffusion_dlco": NUMERIC,
    "karnofsky_score": NUMERIC,
    "ecog_score": NUMERIC,
}
OUTCOMES = (  # known after diagnosis only
    *("vital_status", "last_contact_days_to", "death_days_to", "tumor_status"),
    *("new_tumor_event_dx_indicator", "treatment_outcome_first_course", "residual_tumor"),
    *("radiation_treatment_adjuvant", "targeted_molecular_therapy", "performance_status_timing"),
)
SMOKING_COLUMNS = (
    SMOKING,
    "tobacco_smoking_pack_years_smoked",
    "tobacco_smoking_year_started",
    "tobacco_smoking_year_stopped",
)
STAGE_COLUMNS = (
    STAGE,
    "ajcc_staging_edition",
    "ajcc_tumor_pathologic_pt",
    "ajcc_nodes_pathologic_pn",
    "ajcc_metastasis_pathologic_pm",
)
SMOKING_LEVELS = ("1", "2", "3", "4", "5")
STAGES = ("I", "II", "III", "IV")
TASKS = {  # task -> classes, problem type, family of scores, columns that tell the label
    "never_smoker": (("smoker", "never_smoker"), SINGLE_LABEL, CLINICAL_BINARY, SMOKING_COLUMNS),
    "stage": (STAGES, SINGLE_LABEL, CLINICAL_CLASSES, STAGE_COLUMNS),
    "survival": ((), SURVIVAL, None, ()),
}


class TcgaLuadData(PatientData):
    """TCGA-LUAD by patient.

    Args:
        data_dir: folder that holds the five files, or `tcga_luad/` with them.
        label: "never_smoker" (indicator 1 against 2 to 5), "stage" (I to IV), or "survival" (days
            to death, or censored at the last contact; patients without a day of follow-up are left
            out).
        fold: which fifth of the patients is the test split; the next one is validation. Folds are
            stratified, by keyed hash of the barcode.
        seed: another seed, other folds.

    Raises:
        ConfigError: no `data_dir`, or an unknown option.
        DataError: a file is missing, or not in the layout.
    """

    name = "tcga_luad"
    modalities = MODALITIES
    license = "TCGA-LUAD, open-access tier (NCI Genomic Data Commons)"

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        label: str = "never_smoker",
        fold: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(data_dir)
        if self.data_dir is None:
            raise ConfigError("data set 'tcga_luad' needs data_dir: a folder with clinical.csv.")
        check_choice("label", label, [*TASKS], name=self.name)
        check_whole("seed", seed, name=self.name)
        if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < FOLDS:
            raise ConfigError(f"tcga_luad: fold ({fold!r}) must be 0 to {FOLDS - 1}.")
        nested = self.data_dir / "tcga_luad"
        folder = nested if nested.is_dir() else self.data_dir
        names = [*(file for file, _ in OMICS.values()), "clinical.csv"]
        self.paths = [find_file(folder, name) for name in names]
        self.label, self.fold, self.seed = label, fold, seed
        self.label_names, self.problem_type, self.task, telling = TASKS[label]
        self.leaks = {
            **dict.fromkeys(OUTCOMES, "known after diagnosis only"),
            **dict.fromkeys(telling, f"tells the label {label!r}"),
        }

    def read(self) -> Patients:
        """Labels, folds, then the tables with statistics of the training patients."""
        clinical = read_clinical(self.paths[-1])
        labels = {
            name: found
            for row, name in enumerate(clinical[BARCODE])
            if (found := self._label(clinical, row)) is not None
        }
        strata = {k: v[1] if self.label == "survival" else v for k, v in labels.items()}
        fold_of = folds(list(labels), strata, count=FOLDS, dataset=self.name, seed=self.seed)
        split_of = fold_splits(fold_of, fold=self.fold, count=FOLDS)
        train = set(split_of["train"])
        payloads = {
            modality: _omics(path, train, modality=modality, counts=counts)
            for path, (modality, (_, counts)) in zip(self.paths, OMICS.items(), strict=False)
        }
        payloads["clinical"] = self._clinical(clinical, train)
        # a table in which nothing is known is refused when its patients are looked for
        first = {name: next(iter(rows.values()), None) for name, rows in payloads.items()}
        widths = {name: row.shape[0] if row else 0 for name, row in first.items()}
        return Patients(
            split_of,
            labels,
            payloads,
            array_shapes={name: table_entry(width) for name, width in widths.items()},
            left_out={"without a label": len(clinical[BARCODE]) - len(labels)},
        )

    def _label(self, clinical: Mapping[str, np.ndarray], row: int) -> Any:
        """A patient's label; None where the file does not tell it."""
        if self.label == "never_smoker":
            cell = clinical[SMOKING][row]
            return int(cell == "1") if cell in SMOKING_LEVELS else None
        if self.label == "survival":
            return _survival(*(clinical[name][row] for name in (*FOLLOWED, DEATH)))
        words = (clinical[STAGE][row] or "").removeprefix("Stage ").rstrip("AB")
        return STAGES.index(words) if words in STAGES else None

    def _clinical(self, clinical: Mapping[str, np.ndarray], train: set[str]) -> dict[str, Any]:
        """The clinical vectors, from columns that are known at diagnosis and tell no label."""
        kinds = {name: kind for name, kind in DIAGNOSIS.items() if name not in self.leaks}
        columns = {
            name: plain_numbers(clinical[name].tolist()) if kind == NUMERIC else clinical[name]
            for name, kind in kinds.items()
        }
        names = clinical[BARCODE].tolist()
        encoder = TableEncoder(kinds).fit(columns, np.array([name in train for name in names]))
        return vectors(names, encoder.encode(columns))


def _survival(status: str | None, seen: str | None, died: str | None) -> Any:
    """(days, whether the patient died); None without a day of follow-up."""
    dead = status == "Dead"
    [days] = plain_numbers([died if dead else seen])
    return (float(days), float(dead)) if days > 0 else None


def read_clinical(path: Path) -> dict[str, np.ndarray]:
    """Column -> cells as texts, None where a cell is in square brackets or empty.

    Raises:
        DataError: a column is missing, or a patient is there twice.
    """
    with reading(str(path)):
        names = pa_csv.open_csv(path).schema.names
    needed = [BARCODE, *DIAGNOSIS, *FOLLOWED, DEATH]
    if len(set(names)) != len(names):
        raise DataError(f"{path} has a column twice; take the file as it was downloaded.")
    lacking = [name for name in needed if name not in names]
    if lacking:
        raise DataError(
            f"{path} has no column {', '.join(map(repr, lacking))}; take the whole file."
        )
    with reading(str(path)):
        as_text = pa_csv.ConvertOptions(column_types={name: pa.string() for name in names})
        table = pa_csv.read_csv(path, convert_options=as_text)
    found = {}
    for name in needed:
        cells = [None if not c or c.startswith("[") else c for c in table[name].to_pylist()]
        found[name] = np.array(cells, dtype=object)
    if len(set(found[BARCODE])) != len(found[BARCODE]):
        raise DataError(f"{path}: a patient is there twice.")
    if not len(found[BARCODE]):
        raise DataError(f"{path} names no patient.")
    return found


def _numeric(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _omics(path: Path, train: set[str], *, modality: str, counts: bool) -> dict[str, Any]:
    """Patient -> vector."""
    with reading(str(path)):
        table = pq.read_table(path)
    if "patient" not in table.column_names:
        raise DataError(f"{path} has no column 'patient'.")
    if pa.types.is_nested(table.schema.field("patient").type):
        raise DataError(f"{path}: the column 'patient' must hold names.")
    names = table["patient"].to_pylist()
    if len(set(names)) != len(names):
        raise DataError(f"{path}: a patient is there twice.")
    columns = [name for name in table.column_names if name != "patient"]
    if not (names and columns and all(_numeric(table.schema.field(n).type) for n in columns)):
        raise DataError(f"{path} must hold a row for each patient, and beside it numbers alone.")
    wide_ND = np.stack([table[name].to_numpy() for name in columns], axis=1)
    if (np.abs(wide_ND) > LARGEST).any() or (counts and (wide_ND < 0).any()):
        raise DataError(f"{path} has infinite or too large values, or counts below 0.")
    values_ND = wide_ND.astype(np.float32)
    if counts:
        values_ND = np.log2(values_ND + 1)
    if modality != "mutation":
        values_ND = standardised(values_ND, np.array([name in train for name in names]))
    return vectors(names, values_ND)
