"""Tiny hospital exports with the column names of MIMIC-III, MIMIC-IV and eICU; all made up.

Stay n lasts 3 days, or 10 where n is divisible by 4, and its patient dies where n is divisible by
5. Its heart rate is 60 + n after one hour.
"""

import gzip
from pathlib import Path

import numpy as np
import torch

STAYS = 40
NOTE = "Patient walks the dog Fridolin."


def put_gz(path: Path, heading: str, lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [",".join("" if cell is None else str(cell) for cell in line) for line in lines]
    path.write_bytes(gzip.compress("\n".join([heading, *rows, ""]).encode()))
    return path


def days(n: int) -> int:
    return 10 if n % 4 == 0 else 3


def at(n: int, hours: float) -> str:
    """A time so many hours after the start of stay n, which begins at noon."""
    minutes = round(hours * 60) + 12 * 60
    day, rest = divmod(minutes, 24 * 60)
    return f"2150-{1 + n % 12:02d}-{5 + day:02d} {rest // 60:02d}:{rest % 60:02d}:00"


def events(n: int):
    """(item, hours, value, hours when stored) of stay n, of vital signs."""
    yield 211, 1.0, 60 + n, 1.1
    yield 211, 47.0, 70 + n, 47.5
    yield 211, 49.0, 999, 49.5  # after the prediction time
    yield 618, 2.5, 16, 50.0  # stored after it
    yield 618, 3.0, 18 + n % 2, 3.0
    yield 618, 4.0, None, 4.0  # a text
    yield 211, -2.0, 999, -2.0  # before the stay


def admissions(patient: int = 1000, stay: int = 5000):
    for n in range(STAYS):
        died = int(n % 5 == 0)
        kind = ("EMERGENCY", "ELECTIVE")[n % 2]
        yield (patient + n // 2, stay + n, at(n, 0), at(n, days(n) * 24), died, kind)


def mimic3(
    folder: Path,
    *,
    patient: int = 1000,
    stay: int = 5000,
    insurer: str = "Private",
    lab: float = 10,
) -> Path:
    """Two stays of each patient; laboratory values without an admission; one child.

    The insurer and the laboratory value are those of the first stay.
    """
    lines = [(*row[:4], row[5], "CLINIC", "Private", row[4]) for row in admissions(patient, stay)]
    lines[0] = (*lines[0][:6], insurer, lines[0][7])
    heading = "subject_id,hadm_id,admittime,dischtime,admission_type,admission_location,insurance"
    put_gz(folder / "ADMISSIONS.csv.gz", f"{heading},hospital_expire_flag", lines)
    born = [
        (patient + n, "FM"[n % 2], f"{2149 if n == 3 else 2080 + n}-01-01 00:00:00")
        for n in range(20)
    ]
    born[7] = (patient + 7, "M", "1850-01-01 00:00:00")  # over 89
    put_gz(folder / "PATIENTS.csv.gz", "subject_id,gender,dob", born)
    names = [(211, "Heart Rate"), (618, "Respiratory Rate")]
    put_gz(folder / "D_ITEMS.csv.gz", "itemid,label", names)
    put_gz(folder / "D_LABITEMS.csv.gz", "itemid,label", [(50868, "Anion Gap")])
    chart = [
        (patient + n // 2, stay + n, item, at(n, hours), at(n, stored), value, 0)
        for n in range(STAYS)
        for item, hours, value, stored in events(n)
    ]
    chart.append((patient, stay, 211, at(0, 5), at(0, 5), 888, 1))
    heading = "subject_id,hadm_id,itemid,charttime,storetime,valuenum,error"
    put_gz(folder / "CHARTEVENTS.csv.gz", heading, chart)
    labs = [
        (patient + n // 2, None, 50868, at(n, 6), lab if n == 0 else 10 + n) for n in range(STAYS)
    ]
    put_gz(folder / "LABEVENTS.csv.gz", "subject_id,hadm_id,itemid,charttime,valuenum", labs)
    codes = [(stay + n, "4280" if n % 2 == 0 else "V3000") for n in range(STAYS)]
    put_gz(folder / "DIAGNOSES_ICD.csv.gz", "hadm_id,icd9_code", codes)
    notes = [
        (stay, at(0, 2), "Nursing", NOTE, None),
        (stay, at(0, 60), "Nursing", "too late", None),
        (stay + 1, at(1, 2), "Discharge summary", "she died", None),
    ]
    put_gz(folder / "NOTEEVENTS.csv.gz", "hadm_id,charttime,category,text,iserror", notes)
    return folder


def mimic4(folder: Path) -> Path:
    """The folders hosp and icu, and the radiology notes."""
    lines = [(*row[:4], row[5], "CLINIC", "Private", row[4]) for row in admissions()]
    heading = "subject_id,hadm_id,admittime,dischtime,admission_type,admission_location,insurance"
    put_gz(folder / "hosp" / "admissions.csv.gz", f"{heading},hospital_expire_flag", lines)
    people = [(1000 + n, "FM"[n % 2], 40 + n, 2148) for n in range(20)]
    heading = "subject_id,gender,anchor_age,anchor_year"
    put_gz(folder / "hosp" / "patients.csv.gz", heading, people)
    put_gz(folder / "icu" / "d_items.csv.gz", "itemid,label", [(211, "Heart Rate")])
    chart = [
        (1000 + n // 2, 5000 + n, 9000 + n, at(n, hours), at(n, stored), item, value)
        for n in range(STAYS)
        for item, hours, value, stored in events(n)
    ]
    heading = "subject_id,hadm_id,stay_id,charttime,storetime,itemid,valuenum"
    put_gz(folder / "icu" / "chartevents.csv.gz", heading, chart)
    labs = [(1000 + n // 2, 5000 + n, 50868, at(n, 6), at(n, 7), 10 + n) for n in range(STAYS)]
    heading = "subject_id,hadm_id,itemid,charttime,storetime,valuenum"
    put_gz(folder / "hosp" / "labevents.csv.gz", heading, labs)
    codes = [(5000 + n, 10, "I509") for n in range(STAYS)]
    put_gz(folder / "hosp" / "diagnoses_icd.csv.gz", "hadm_id,icd_version,icd_code", codes)
    notes = [(5000, at(0, 2), at(0, 3), NOTE), (5001, at(1, 2), at(1, 60), "read too late")]
    notes += [(5000 + n, at(n, 2), at(n, 3), "clear") for n in range(2, STAYS, 3)]
    put_gz(folder / "note" / "radiology.csv.gz", "hadm_id,charttime,storetime,text", notes)
    return folder


def eicu(folder: Path) -> Path:
    """Names in mixed case; a second unit stay; ages over 89 as a text."""
    heading = (
        "patientunitstayid,uniquepid,age,unitvisitnumber,hospitaldischargeoffset,"
        "hospitaldischargestatus,gender,unittype,unitadmitsource,admissionheight,admissionweight"
    )
    lines = [
        (
            *(7000 + n, f"002-{n // 2}", "> 89" if n == 1 else 40 + n, 1, days(n) * 24 * 60),
            *("Expired" if n % 5 == 0 else "Alive", "Female", "MICU", "Floor", 170 + n % 9, None),
        )
        for n in range(STAYS)
    ]
    lines.append((7999, "002-0", 40, 2, 9999, "Alive", "Female", "MICU", "Floor", 170, 70))
    put_gz(folder / "patient.csv.gz", heading, lines)
    vitals = [
        (7000 + n, round(hours * 60), value, 97 if item == 211 else None)
        for n in range(STAYS)
        for item, hours, value, _ in events(n)
        if item == 211
    ]
    heading = "patientunitstayid,observationoffset,heartrate,sao2"
    put_gz(folder / "vitalPeriodic.csv.gz", heading, vitals)
    labs = [(7000 + n, 360, "glucose", 100 + n, 3600 if n == 8 else 370) for n in range(STAYS)]
    heading = "patientunitstayid,labresultoffset,labname,labresult,labresultrevisedoffset"
    put_gz(folder / "lab.csv.gz", heading, labs)
    codes = [
        (7000 + n, 60 * (1 + 70 * (n % 2)), "cardiovascular|shock|septic") for n in range(STAYS)
    ]
    put_gz(folder / "diagnosis.csv.gz", "patientunitstayid,diagnosisoffset,diagnosisstring", codes)
    put_gz(folder / "note.csv.gz", "patientunitstayid,noteoffset,notetext", [(7000, 30, NOTE)])
    return folder


def mimic_tensors(folder: Path) -> Path:
    """Forty rows of twenty patients; a row of -2 and one of zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, width in (("lab_x", 6), ("note_x", 5), ("code_x", 4)):
        values = torch.from_numpy(rng.normal(3.0, 2.0, (STAYS, width))).float()
        values[3] = -2.0 if name == "note_x" else values[3]
        values[4] = 0.0 if name == "code_x" else values[4]
        torch.save(values if name != "lab_x" else values.double(), folder / f"{name}.pt")
    lines = [f"{1000 + n // 2},{n % 2}" for n in range(STAYS)]
    text = "\n".join(["subject_id,one_year_mortality", *lines, ""])
    (folder / "labels.csv").write_text(text)
    return folder
