"""What the Hub of the tests knows, and what it answers: the routes, status codes, error headers and messages of the Hub."""

import base64
import fnmatch
import hashlib
import itertools
import json
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import yaml

# Larger files, and files that are not text, are kept aside (LFS) even where .gitattributes does not say so.
MAX_REGULAR_BYTES = 10 * 2**20
# fmt: off
LARGE = ["7z", "arrow", "bin", "bz2", "ckpt", "gz", "h5", "msgpack", "npy", "npz", "onnx", "parquet", "pt", "safetensors", "tar", "zip"]
LARGE_IN_DATASETS = [*LARGE, "bmp", "gif", "jpeg", "jpg", "png", "tiff", "webp", "flac", "mp3", "ogg", "wav", "mp4", "webm"]
LICENSES = [
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc", "cc-by-2.0",
    "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-2.0", "epl-2.0", "eupl-1.2", "gemma", "gfdl", "gpl", "gpl-2.0",
    "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "llama3", "mit", "mpl-2.0", "ms-pl", "odbl", "odc-by", "openrail", "other",
    "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
]
# fmt: on


@dataclass(frozen=True)
class User:
    """Whom a token belongs to, and whether it may write to what is theirs."""

    name: str
    write: bool = True
    organizations: tuple[str, ...] = ()

    def owns(self, repo_id):
        return repo_id.split("/")[0] in (self.name, *self.organizations)


@dataclass(frozen=True)
class File:
    """A file as git keeps it: its bytes, or the pointer to a large file with this SHA-256."""

    content: bytes
    size: int
    sha256: str | None = None

    @property
    def oid(self):
        """The SHA-1 that `git hash-object` prints."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    description: str
    author: str
    date: str
    parent: str | None
    files: dict[str, File]


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    variables: dict[str, dict] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision):
        """The commit that a branch, a tag or a SHA names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


@dataclass
class Answer:
    """What a route gives where it is not JSON with the status 200."""

    content: Any
    headers: dict[str, Any] = field(default_factory=dict)
    status: int = 200


@dataclass
class Call:
    """What a route is given: who asks, the names in the path, the body."""

    method: str
    user: User | None
    names: dict[str, str]
    query: dict[str, list[str]]
    body: Any

    def json(self):
        return json.loads(self.body.read() or b"{}")


class Refused(Exception):
    """An answer that is an error, in the Hub's form."""

    def __init__(self, status, message, code=None, headers=(), **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message} | body
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | dict(headers)


ROUTES = []
NAMES = {
    "{kind}": "(?P<kind>model|dataset|space)s",
    "{prefix}": "(?:(?P<kind>dataset|space)s/)?",
    "{repo}": "(?P<repo>[^/]+(?:/[^/]+)??)",
    "{rev}": "(?P<rev>[^/]+)",
    "{path}": "(?P<path>.+)",
    "{large}": "/lfs/(?P<kind>model|dataset|space)/(?P<repo>.+)/(?P<sha256>[0-9a-f]{64})",
}


def route(methods, pattern):
    """The method answers such requests, with what becomes JSON, or with an `Answer` of JSON, bytes or a file's path."""
    for name, names in NAMES.items():
        pattern = pattern.replace(name, names)

    def register(answer):
        ROUTES.append((methods.split(), re.compile(pattern + "$"), answer))
        return answer

    return register


class Hub:
    """What the Hub knows, and what it answers."""

    url = storage_url = ""  # of its pages, and of its large files

    def __init__(self):
        self.lock = threading.RLock()
        self.folder = Path(tempfile.mkdtemp(prefix="hub-"))
        self.clock = itertools.count(1)  # never set back: no commit of a later test has the SHA of an earlier one's
        self.reset()

    def reset(self):
        """Forget every repo."""
        with self.lock:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.tokens = {
                "hf_me": User("me", organizations=("shop",)),
                "hf_read": User("reader", write=False),
                "hf_other": User("other"),
            }
            self.repos: dict[tuple[str, str], Repo] = {}
            self.uploaded: list[str] = []

    def repo(self, repo_id, repo_type="model", revision="main"):
        """The files of a repo at a revision: path → bytes."""
        files = self.repos[repo_type, repo_id].at(revision).files
        return {
            path: self.large_file(repo_type, repo_id, file.sha256).read_bytes() if file.sha256 else file.content
            for path, file in sorted(files.items())
        }

    def commits(self, repo_id, repo_type="model", revision="main"):
        """The commits of a revision, newest first."""
        repo = self.repos[repo_type, repo_id]
        commits = [repo.at(revision)]
        while parent := commits[-1].parent:
            commits.append(repo.commits[parent])
        return commits

    def find(self, call, write=False):
        """The repo of a call, if who asks may see it, or write to it."""
        kind, repo_id, user = call.names["kind"] or "model", call.names["repo"], call.user
        repo, mine = self.repos.get((kind, repo_id)), user is not None and user.owns(repo_id)
        hidden = repo is None or (repo.private and not mine)
        if user is None and (hidden or write):
            # The Hub sends no code here: its client knows the case by the address, but only one that begins with https.
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and not user.write:
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository")
        if write and not mine:
            raise Refused(403, "Authorization error")
        return repo

    def large_file(self, kind, repo, sha256):
        return self.folder / kind / repo / sha256

    def page(self, repo):
        return f"{self.url}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.id}"

    def add_commit(self, repo, branch, files, title, author, description="", parent=None):
        number = next(self.clock)
        oid = hashlib.sha1(f"{number} {repo.id} {title}".encode()).hexdigest()
        date = f"2026-01-01T{number // 3600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}.000Z"
        repo.commits[oid] = Commit(oid, title, description, author, date, parent, files)
        repo.branches[branch] = oid
        return repo.commits[oid]

    # Accounts and repos.

    @route("GET", "/api/whoami-v2")
    def whoami(self, call):
        if call.user is None:
            raise Refused(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if call.user.write else "read"}
        orgs = [{"type": "org", "name": name, "fullname": name} for name in call.user.organizations]
        name = call.user.name
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "id": name, "name": name, "fullname": name, "orgs": orgs, "auth": auth}

    @route("POST", "/api/repos/create")
    def create_repo(self, call):
        wish = call.json()
        if call.user is None:
            raise Refused(401, "Invalid username or password.")
        kind, namespace, name = wish.get("type") or "model", wish.get("organization") or call.user.name, wish["name"]
        private = wish.get("visibility") == "private" or wish.get("private", False)
        repo = Repo(kind, f"{namespace}/{name}", private, sdk=wish.get("sdk"))
        if not (call.user.write and call.user.owns(repo.id)):
            raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        if (kind, repo.id) in self.repos:
            raise Refused(409, f"You already created this {kind} repo", url=self.page(repo))
        self.repos[kind, repo.id] = repo
        repo.variables = {variable["key"]: variable for variable in wish.get("variables", [])}
        endings = LARGE_IN_DATASETS if kind == "dataset" else LARGE
        files = {".gitattributes": attributes(f"*.{ending}" for ending in endings)}
        if kind == "space":
            files["README.md"] = small(f"---\ntitle: {name}\nsdk: {repo.sdk}\n---\n".encode())
        self.add_commit(repo, "main", files, "initial commit", call.user.name)
        return {"url": self.page(repo), "name": repo.id}

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, call):
        wish = call.json()
        call.names = {"kind": wish.get("type"), "repo": f"{wish.get('organization') or call.user.name}/{wish['name']}"}
        repo = self.find(call, write=True)
        del self.repos[repo.kind, repo.id]
        shutil.rmtree(self.folder / repo.kind / repo.id, ignore_errors=True)
        return {}

    @route("GET", "/api/{kind}/{repo}(?:/revision/{rev})?")
    def repo_info(self, call):
        repo = self.find(call)
        commit = repo.at(call.names["rev"] or "main")
        card, _ = read_card(commit.files["README.md"].content, repo.kind) if "README.md" in commit.files else ({}, [])
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in call.query:
            for sibling in siblings:
                file = commit.files[sibling["rfilename"]]
                sibling |= {"blobId": file.oid, "size": file.size}
                if file.sha256:
                    sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.content)}
        return {name: card[name] for name in ("library_name", "pipeline_tag", "model-index") if name in card} | {
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "private": repo.private,
            "gated": repo.gated,
            "sdk": repo.sdk,
            "sha": commit.oid,
            "lastModified": commit.date,
            "siblings": siblings,
            "cardData": card,
            "tags": card.get("tags", []),
        }

    @route("GET POST DELETE", "/api/{kind}/{repo}/variables")
    def space_variables(self, call):
        repo = self.find(call, write=True)
        if call.method == "POST":
            wish = call.json()
            repo.variables[wish["key"]] = wish
        elif call.method == "DELETE":
            repo.variables.pop(call.json()["key"], None)
        return repo.variables

    @route("GET", "/api/{kind}/{repo}/runtime")
    def space_runtime(self, call):
        stage = "RUNNING" if "app.py" in self.find(call).at("main").files else "NO_APP_FILE"
        return {"stage": stage, "hardware": {"current": None, "requested": "cpu-basic"}}

    # Reading.

    def entries(self, commit, paths, expand):
        """What tree and paths-info say about files and folders."""
        last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": commit.date}} if expand else {}
        for path in paths:
            if file := commit.files.get(path):
                entry = {"type": "file", "path": path, "oid": file.oid, "size": file.size} | last
                if file.sha256:
                    entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.content)}
                yield entry
            elif any(name.startswith(path + "/") for name in commit.files):
                yield {"type": "directory", "path": path, "oid": small(path.encode()).oid, "size": 0} | last

    @route("GET", "/api/{kind}/{repo}/tree/{rev}(?:/{path})?")
    def tree(self, call):
        commit, top = self.find(call).at(call.names["rev"]), call.names["path"]
        recursive, expand = (call.query.get(name) == ["true"] for name in ("recursive", "expand"))
        parts = [path.split("/") for path in sorted(commit.files) if not top or path.startswith(top + "/")]
        if not parts:
            message = f'{top} does not exist on "{call.names["rev"]}"'
            raise Refused(404, message, "EntryNotFound", {"X-Repo-Commit": commit.oid})
        depth = len(top.split("/")) + 1 if top else 1
        found = dict.fromkeys(
            "/".join(names[:end]) for names in parts for end in range(depth, len(names) + 1 if recursive else depth + 1)
        )
        return list(self.entries(commit, found, expand))

    @route("POST", "/api/{kind}/{repo}/paths-info/{rev}")
    def paths_info(self, call):
        asked = parse_qs(call.body.read().decode())
        commit = self.find(call).at(call.names["rev"])
        return list(self.entries(commit, asked.get("paths", []), asked.get("expand") == ["true"]))

    @route("GET HEAD", "/{prefix}{repo}/resolve/{rev}/{path}")
    def resolve(self, call):
        repo = self.find(call)
        commit = repo.at(call.names["rev"])
        headers, file = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}, commit.files.get(call.names["path"])
        if repo.gated and not (call.user and call.user.owns(repo.id)):
            status = 403 if call.user else 401
            raise Refused(status, f"Access to {repo.kind} {repo.id} is restricted.", "GatedRepo", headers)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{file.oid}"', "Content-Type": "text/plain; charset=utf-8"}
        if file.sha256 is None:
            return Answer(file.content, headers)
        place = f"{self.storage_url}/lfs/{repo.kind}/{repo.id}/{file.sha256}"
        headers |= {"Location": place, "X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": file.size}
        return Answer(b"", headers, 302)

    @route("GET HEAD", "{large}")
    def download_large(self, call):
        return Answer(self.large_file(**call.names), {"Content-Type": "application/octet-stream"})

    # Pushing.

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, call):
        asked = call.json()
        fields, errors = read_card(asked["content"].encode(), asked["repoType"])
        warnings = [] if fields or errors else ["empty or missing yaml metadata in repo card"]
        found = {"errors": errors, "warnings": warnings}
        found = {name: [{"message": message} for message in messages] for name, messages in found.items()}
        return Answer(found, status=400 if errors else 200)

    @route("POST", "/api/{kind}/{repo}/preupload/{rev}")
    def preupload(self, call):
        files, asked = self.find(call, write=True).at(call.names["rev"]).files, call.json()
        ignored = asked.get("gitIgnore", "").split()
        answers = []
        for path, size, sample in (
            (file["path"], file["size"], base64.b64decode(file["sample"])) for file in asked["files"]
        ):
            large = size > MAX_REGULAR_BYTES or b"\0" in sample or tracked(path, files)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            answer["shouldIgnore"] = any(fnmatch.fnmatch(part, line) for line in ignored for part in path.split("/"))
            answer["oid"] = (files[path].sha256 or files[path].oid) if path in files else None
            answers.append(answer)
        return {"files": answers}

    @route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/batch")
    def large_files(self, call):
        repo, objects = self.find(call, write=True), call.json()["objects"]
        for wanted in objects:
            if not self.large_file(repo.kind, repo.id, wanted["oid"]).exists():
                upload = f"{self.storage_url}/lfs/{repo.kind}/{repo.id}/{wanted['oid']}"
                verify = f"{self.page(repo)}.git/info/lfs/objects/verify"
                wanted["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "{large}")
    def upload_large(self, call):
        place = self.large_file(call.names["kind"], call.names["repo"], call.names["sha256"])
        if hashlib.file_digest(call.body, "sha256").hexdigest() != place.name:
            raise Refused(400, "The content has another SHA-256 than was announced")
        place.parent.mkdir(parents=True, exist_ok=True)
        call.body.seek(0)
        with place.open("wb") as file:
            shutil.copyfileobj(call.body, file)
        self.uploaded.append(place.name)
        return Answer(b"")

    @route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/verify")
    def verify_large(self, call):
        repo, asked = self.find(call, write=True), call.json()
        place = self.large_file(repo.kind, repo.id, asked["oid"])
        if not place.exists() or place.stat().st_size != asked["size"]:
            raise Refused(404, "Object does not exist")
        return {}

    @route("POST", "/api/{kind}/{repo}/commit/{rev}")
    def commit(self, call):
        repo, branch = self.find(call, write=True), call.names["rev"]
        lines = [(line["key"], line["value"]) for line in map(json.loads, call.body.readlines())]
        header = dict(lines)["header"]
        if branch not in repo.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repo.at(branch)
        if not head.oid.startswith(header.get("parentCommit", "")):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for key, value in lines:
            path = value.get("path", "").rstrip("/")
            if key == "file":
                files[path] = small(base64.b64decode(value["content"]))
                if files[path].size > MAX_REGULAR_BYTES:
                    raise Refused(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
            elif key == "lfsFile":
                place = self.large_file(repo.kind, repo.id, value["oid"])
                if not place.exists():
                    raise Refused(400, f"Your push was rejected because an LFS pointer pointed to nothing: {path}")
                size = place.stat().st_size
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{place.name}\nsize {size}\n"
                files[path] = File(pointer.encode(), size, place.name)
                if not tracked(path, files):
                    files[".gitattributes"] = attributes([path], files.get(".gitattributes"))
            elif key in ("deletedFile", "deletedFolder"):
                gone = [path] if key == "deletedFile" else [name for name in files if name.startswith(path + "/")]
                if not gone or gone[0] not in files:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {name: file for name, file in files.items() if name not in gone}
        if "README.md" in files and (errors := read_card(files["README.md"].content, repo.kind)[1]):
            raise Refused(400, "Invalid metadata in README.md", errors=[{"message": error} for error in errors])
        made = self.add_commit(repo, branch, files, header["summary"], call.user.name, header["description"], head.oid)
        return {"success": True, "commitOid": made.oid, "commitUrl": f"{self.page(repo)}/commit/{made.oid}"}

    # Branches, tags and history.

    @route("GET", "/api/{kind}/{repo}/refs")
    def refs(self, call):
        repo = self.find(call)
        branches, tags = (
            [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": oid} for name, oid in known.items()]
            for where, known in (("heads", repo.branches), ("tags", repo.tags))
        )
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    @route("GET", "/api/{kind}/{repo}/commits/{rev}")
    def history(self, call):
        repo = self.find(call)
        return [
            {"id": c.oid, "title": c.title, "message": c.description, "date": c.date, "authors": [{"user": c.author}]}
            for c in self.commits(repo.id, repo.kind, call.names["rev"])
        ]

    @route("POST", "/api/{kind}/{repo}/(?P<what>branch|tag)/{rev}")
    def add_ref(self, call):
        repo, wish, rev = self.find(call, write=True), call.json(), call.names["rev"]
        if call.names["what"] == "branch":
            name, start, known = rev, wish.get("startingPoint") or "main", repo.branches
        else:
            name, start, known = wish["tag"], rev, repo.tags
        if name.startswith("refs/"):
            raise Refused(400, f"Invalid reference for a {call.names['what']}: {name}")
        if name in known:
            raise Refused(409, f"Reference already exists: {name}")
        known[name] = repo.at(start).oid
        return {}

    @route("DELETE", "/api/{kind}/{repo}/(?P<what>branch|tag)/{rev}")
    def delete_ref(self, call):
        repo, name = self.find(call, write=True), call.names["rev"]
        if (repo.branches if call.names["what"] == "branch" else repo.tags).pop(name, None) is None:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    @route("POST", "/api/{kind}/{repo}/super-squash/{rev}")
    def super_squash(self, call):
        repo, branch = self.find(call, write=True), call.names["rev"]
        self.add_commit(repo, branch, repo.at(branch).files, call.json()["message"], call.user.name)
        return {}


def small(content):
    return File(content, len(content))


def attributes(patterns, before=None):
    """The .gitattributes that sends these files to large-file storage, after what it said before."""
    lines = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns)
    return small((before.content if before else b"") + lines.encode())


def tracked(path, files):
    lines = files[".gitattributes"].content.decode().splitlines() if ".gitattributes" in files else []
    return any(fnmatch.fnmatch(name, line.split()[0]) for line in lines for name in (path, path.split("/")[-1]))


def read_card(card, kind):
    """A card's metadata, and what the Hub refuses in it."""
    found = re.match(rb"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        fields = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return {}, [f"Invalid YAML: {error}"]
    if not isinstance(fields, dict):
        return {}, ["YAML metadata must be an object"]

    def values(name):
        value = fields.get(name, [])
        return value if isinstance(value, list) else [value]

    rules = {
        f'"{name}" must be a string or an array of strings': all(isinstance(value, str) for value in values(name))
        for name in ("tags", "language", "datasets", "metrics", "base_model")
    }
    rules[f'"license" must be one of {LICENSES}'] = all(name in LICENSES for name in values("license"))
    rules['"language" must be an ISO 639 code of two or three letters'] = all(
        re.fullmatch(r"[a-z]{2,3}(-\w+)?|code|multilingual", str(name)) for name in values("language")
    )
    rules['"base_model" must be the id of a model on the Hub'] = all(
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name), re.ASCII) for name in values("base_model")
    )
    if kind == "space":
        rules['"sdk" must be one of [gradio, docker, static]'] = fields.get("sdk") in ("gradio", "docker", "static")
        rules['"short_description" must have at most 60 characters'] = len(fields.get("short_description", "")) <= 60
        colors = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
        rules |= {
            f'"{name}" must be one of {colors}': fields.get(name, "red") in colors for name in ("colorFrom", "colorTo")
        }
    return fields, [rule for rule, kept in rules.items() if not kept]
