"""Where a quote carries its 64 bytes of report data: for a server to see that a quote is the one that it asked for.

Nothing here is checked by a signature; who verifies reads these bytes where the signature was (`intel.py`, `sev.py`).
"""

from __future__ import annotations

from fusedllm.partition.attestation import REPORT_DATA_BYTES

# Intel's "TDX DCAP Quoting Library API": a header of 48 bytes, in version 5 a type and a length of 6 bytes, then the
# TD report, with the report data at 520.
_TDX_HEADER = 48
_TDX_BODY_HEADER = {4: 0, 5: 6}
_TDX_REPORT_DATA = 520

# AMD's "SEV Secure Nested Paging Firmware ABI Specification" (56860), ATTESTATION_REPORT.
SNP_REPORT_DATA = 0x50


def report_data_in(provider: str, blob: bytes) -> bytes | None:
    """The report data of a quote; `None` for a provider or a version whose layout is not known here."""
    start = None
    if provider == "sev_guest":
        start = SNP_REPORT_DATA
    elif provider == "tdx_guest":
        body = _TDX_BODY_HEADER.get(int.from_bytes(blob[:2], "little"))
        start = None if body is None else _TDX_HEADER + body + _TDX_REPORT_DATA
    return None if start is None else blob[start : start + REPORT_DATA_BYTES]
