"""PLACEHOLDER of the page router."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
