"""Who may do what on the shared MLflow server: everybody who may edit a model registers, only reviewers make it live.

MLflow's basic authentication asks the same right of a client that makes a version and of one that moves an alias. The
server takes this file as its `authorization_function` (basic_auth.ini) and refuses the aliases that decide what is
served to everyone but members of the role `reviewers` and admins. It runs inside the server, not in the pipeline.
"""

from __future__ import annotations

import json

from flask import Response, request
from mlflow.server import auth
from werkzeug.datastructures import Authorization

ROLE, ROUTE = "reviewers", "/mlflow/registered-models/alias"
LIVE = ("champion", "previous")


def authenticate() -> Authorization | Response:
    """The user whom basic authentication finds; 401 for nobody, 403 for an alias that is not theirs to move."""
    found = auth.authenticate_request_basic_auth()
    if not isinstance(found, Authorization) or not _makes_live() or _is_reviewer(found.username or ""):
        return found
    message = f"{found.username} may not move the aliases {' and '.join(LIVE)}; members of the role {ROLE} may"
    body = json.dumps({"error_code": "PERMISSION_DENIED", "message": message})
    return Response(body, status=403, mimetype="application/json")


def _makes_live() -> bool:
    """Whether this request sets or deletes an alias that decides what is served."""
    if request.method == "GET" or not request.path.endswith(ROUTE):
        return False
    body = request.get_json(force=True, silent=True) or {}
    return (body | request.args.to_dict()).get("alias", LIVE[0]) in LIVE


def _is_reviewer(name: str) -> bool:
    user = auth.store.get_user(name)
    return user.is_admin or any(role.name == ROLE for role in auth.store.list_user_roles(user.id))
