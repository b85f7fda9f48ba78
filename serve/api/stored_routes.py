"""The routes of jobs, batches and webhooks, joined with what they need."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request

from ..dispatch.client.attempts import Attempts
from ..dispatch.client.session import DispatchSession
from ..jobs.job_images import JobImages
from ..settings.application import FrontSettings, Settings
from ..store.link import DatabaseLink
from ..tenants.keys import TenantAccess
from .batch_routes import BatchRoutes
from .file_routes import FileRoutes
from .image_urls import ImageUrls
from .ingress_metrics import IngressMetrics
from .job_routes import JobRoutes
from .route_context import RouteContext
from .tenant_gate import TenantGate
from .timing import IngressTiming
from .webhook_routes import WebhookRoutes


class StoredRoutes:
    """All routes of work that is stored. `context`: reads their bodies and the database."""

    def __init__(
        self,
        settings: FrontSettings,
        gate: TenantGate,
        access: Callable[[str], TenantAccess],
        authenticate_again: Callable[[Request], None],
        live: Callable[[], Settings],
        session: DispatchSession,
        attempts: Attempts,
        urls: ImageUrls,
        metrics: IngressMetrics,
        timing: IngressTiming,
    ) -> None:
        """The arguments are those of the parts. Raises `OSError` without the data folder."""
        self.database = DatabaseLink(settings.database or {})
        self.context = RouteContext(self.database, gate, access, authenticate_again, live, timing)
        images = JobImages(settings)
        self.jobs = JobRoutes(self.context, session, attempts, urls, images, metrics, timing)
        self.routes = [
            *self.jobs.routes,
            *FileRoutes(self.context, self.jobs.answer_of, timing).routes,
            *BatchRoutes(self.context, session).routes,
            *WebhookRoutes(self.context).routes,
        ]
