"""PLACEHOLDER of the health router."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
