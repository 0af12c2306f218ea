"""Every refusal, typed, with the HTTP status it becomes and a message that says what to do.

AdapterServerError
├── InvalidRequest      422  a field of the request is wrong: `param` names it
├── Unauthorized        401  no key, or one that is not known
├── Forbidden           403  a key without the right, or a Host header that is not this machine's
├── PromptTooLong       413  prompt and new tokens do not fit the context
├── BodyTooLarge        413  the body is larger than the server reads
├── HeadersTooLarge     431  the same of the headers
├── BodyTooSlow         408  the body did not come in time
├── ClientTooSlow       408  the client does not read its stream
├── AdapterNotFound     404  no adapter, or no version, of that name
├── AdapterRefused      424  the adapter's files break a rule
│   └── VersionGone     424  the files changed between admission and load
├── AdapterUnavailable  424  the adapter is sound and does not fit or could not be loaded
├── VersionConflict     409  another is changing this adapter, or there is no version to go back to
├── StorageFailed       500  the disk refused a write: what was there before is there still
├── NotMergeable        422  the adapter has no merged form (409 on the admin routes)
├── QueueFull           429  with `retry_after` seconds
├── RateLimited         429  this key has used what it may, with `retry_after` seconds
├── Unavailable         503  starting, draining or dead, with `retry_after` seconds
├── RequestFailed       500  this request failed inside
├── DeadlineExceeded    504  the deadline passed before the first token
├── PlugInBroken         –   at start: a family of another package cannot be used
└── BaseNotSupported     –   at start: this base model cannot be served
"""

from __future__ import annotations


class AdapterServerError(Exception):
    """The root. `status` and `code` are of the class; `param` names the field at fault, if one is."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(AdapterServerError):
    status, code = 422, "invalid_request"


class Unauthorized(AdapterServerError):
    status, code = 401, "unauthorized"


class Forbidden(AdapterServerError):
    status, code = 403, "forbidden"


class PromptTooLong(AdapterServerError):
    status, code = 413, "prompt_too_long"


class BodyTooLarge(AdapterServerError):
    status, code = 413, "body_too_large"


class HeadersTooLarge(AdapterServerError):
    status, code = 431, "headers_too_large"


class BodyTooSlow(AdapterServerError):
    status, code = 408, "body_too_slow"


class AdapterNotFound(AdapterServerError):
    status, code = 404, "adapter_not_found"


class AdapterRefused(AdapterServerError):
    status, code = 424, "adapter_refused"


class VersionGone(AdapterRefused):
    code = "version_gone"


class AdapterUnavailable(AdapterServerError):
    status, code = 424, "adapter_unavailable"


class VersionConflict(AdapterServerError):
    status, code = 409, "version_conflict"


class StorageFailed(AdapterServerError):
    status, code = 500, "storage_failed"


class NotMergeable(AdapterServerError):
    status, code = 422, "not_mergeable"


class QueueFull(AdapterServerError):
    status, code = 429, "queue_full"


class RateLimited(AdapterServerError):
    status, code = 429, "rate_limited"


class ClientTooSlow(AdapterServerError):
    status, code = 408, "client_too_slow"


class Unavailable(AdapterServerError):
    status, code = 503, "unavailable"


class RequestFailed(AdapterServerError):
    status, code = 500, "request_failed"


class DeadlineExceeded(AdapterServerError):
    status, code = 504, "deadline_exceeded"


class PlugInBroken(AdapterServerError):
    status, code = 500, "plug_in_broken"


class BaseNotSupported(AdapterServerError):
    status, code = 500, "base_not_supported"
