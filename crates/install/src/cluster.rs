//! A cluster, by its API server: requests, and errors as sentences.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use http::{Method, Request};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config, Error};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::objects::{FIELD_MANAGER, Object};

/// The longest that a connection to the API server may take.
const CONNECT: Duration = Duration::from_secs(10);
/// The longest that an answer may take.
const ANSWER: Duration = Duration::from_secs(60);
/// When a workload was told to make its pods anew.
const RESTARTED: &str = "justmtls.dev/restarted-at";
/// How many objects are asked for at once.
const PAGE: usize = 500;

/// Which cluster is meant, as with kubectl.
#[derive(clap::Args, Clone, Default, Debug)]
pub struct Place {
    /// The kubeconfig; otherwise those of $KUBECONFIG, or the user's own.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig; otherwise its current one.
    #[arg(long)]
    pub context: Option<String>,
}

/// A connection to it.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    server: String,
}

impl Cluster {
    /// Reads the kubeconfig; nothing is asked yet.
    pub(crate) async fn connect(place: &Place) -> anyhow::Result<Self> {
        let kubeconfig = match &place.kubeconfig {
            Some(path) => Kubeconfig::read_from(path)
                .with_context(|| format!("--kubeconfig {}: it cannot be read", path.display()))?,
            None => Kubeconfig::read().map_err(no_kubeconfig)?,
        };
        let names: Vec<_> = kubeconfig.contexts.iter().map(|context| context.name.clone()).collect();
        if let Some(context) = place.context.as_ref().filter(|context| !names.contains(context)) {
            bail!(
                "--context {context}: the kubeconfig has no such context; it has {}",
                if names.is_empty() { "none".to_owned() } else { names.join(", ") }
            );
        }
        let options = KubeConfigOptions { context: place.context.clone(), ..KubeConfigOptions::default() };
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| {
            anyhow!(
                "the kubeconfig names no usable cluster: {}; mend it, or name another context by --context",
                innermost(&error)
            )
        })?;
        config.connect_timeout = Some(CONNECT);
        config.read_timeout = Some(ANSWER);
        let server = config.cluster_url.to_string();
        let client = Client::try_from(config).with_context(|| format!("no connection to {server} can be made"))?;
        Ok(Self { client, server })
    }

    /// An object, if it is there.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Option<Value>> {
        match self.ask(Method::GET, path, None, None).await {
            Ok(value) => Ok(Some(value)),
            Err(Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(self.explain(error, &format!("reading {path}"))),
        }
    }

    /// All objects of a collection; none where the API server does not know the kind.
    pub(crate) async fn list<T: DeserializeOwned>(&self, path: &str, query: &str) -> anyhow::Result<Vec<T>> {
        let mut all = Vec::new();
        let mut next = String::new();
        loop {
            let mut page = format!("{path}?limit={PAGE}");
            for (name, value) in
                [("&", query), ("&continue=", &*next)].into_iter().filter(|(_, value)| !value.is_empty())
            {
                page.push_str(name);
                page.push_str(value);
            }
            let mut answer = match self.ask(Method::GET, &page, None, None).await {
                Ok(answer) => answer,
                Err(Error::Api(status)) if status.code == 404 => return Ok(all),
                Err(error) => return Err(self.explain(error, &format!("listing {path}"))),
            };
            if let Value::Array(items) = answer["items"].take() {
                for item in items {
                    let read = serde_json::from_value(item);
                    all.push(
                        read.with_context(|| format!("listing {path}: the API server's answer is not understood"))?,
                    );
                }
            }
            next = encoded(answer["metadata"]["continue"].as_str().unwrap_or_default());
            if next.is_empty() {
                return Ok(all);
            }
        }
    }

    /// Applies an object, server-side, as ourselves.
    pub(crate) async fn apply(&self, object: &Object, dry_run: bool, force: bool) -> Result<Value, Error> {
        let mut path = format!("{}?fieldManager={FIELD_MANAGER}&fieldValidation=Strict", path(object));
        if dry_run {
            path.push_str("&dryRun=All");
        }
        if force {
            path.push_str("&force=true");
        }
        let body = object.value.to_string().into_bytes();
        self.ask(Method::PATCH, &path, Some("application/apply-patch+yaml"), Some(body)).await
    }

    /// Lets a workload make all of its pods anew, as `kubectl rollout restart` does: by an annotation of its template, which is
    /// not among the fields that are applied.
    pub(crate) async fn restart(&self, path: &str) -> anyhow::Result<()> {
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        let annotations = json!({ RESTARTED: now });
        let body = json!({ "spec": { "template": { "metadata": { "annotations": annotations } } } });
        let path = format!("{path}?fieldManager={FIELD_MANAGER}-restart");
        let patched =
            self.ask(Method::PATCH, &path, Some("application/merge-patch+json"), Some(body.to_string().into_bytes()));
        patched.await.map(drop).map_err(|error| self.explain(error, &format!("restarting {path}")))
    }

    /// Deletes an object; gives whether it was there. What belongs to it goes first.
    pub(crate) async fn delete(&self, path: &str) -> anyhow::Result<bool> {
        let body = br#"{"kind":"DeleteOptions","apiVersion":"v1","propagationPolicy":"Foreground"}"#.to_vec();
        match self.ask(Method::DELETE, path, Some("application/json"), Some(body)).await {
            Ok(_) => Ok(true),
            Err(Error::Api(status)) if status.code == 404 => Ok(false),
            Err(error) => Err(self.explain(error, &format!("deleting {path}"))),
        }
    }

    /// A page of text, such as a log.
    pub(crate) async fn text(&self, path: &str) -> anyhow::Result<String> {
        let request = Request::get(path).body(Vec::new())?;
        let answer = self.client.request_text(request).await;
        answer.map_err(|error| self.explain(error, &format!("reading {path}")))
    }

    /// The version of the API server: the numbers, and as it says it.
    pub(crate) async fn version(&self) -> anyhow::Result<((u32, u32), String)> {
        let info = self.client.apiserver_version().await;
        let info = info.map_err(|error| self.explain(error, "asking for the version of the API server"))?;
        let number = |text: &str| text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0);
        Ok(((number(&info.major), number(&info.minor)), info.git_version))
    }

    async fn ask(&self, method: Method, path: &str, kind: Option<&str>, body: Option<Vec<u8>>) -> Result<Value, Error> {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(kind) = kind {
            request = request.header(http::header::CONTENT_TYPE, kind);
        }
        let request = request.body(body.unwrap_or_default()).map_err(Error::HttpError)?;
        self.client.request(request).await
    }

    /// An error as one sentence: what was being done, what is wrong, what to do.
    pub(crate) fn explain(&self, error: Error, doing: &str) -> anyhow::Error {
        let server = &self.server;
        match error {
            Error::Api(status) => anyhow!("{doing}: {}", of_status(status.code, &status.message)),
            Error::Auth(error) => anyhow!(
                "{doing}: the kubeconfig's credentials cannot be had: {error}; log in again, or name another context by --context"
            ),
            Error::Service(error) => {
                anyhow!("{doing}: the API server {server} cannot be reached: {}; {REACH}", innermost(&*error))
            }
            Error::HyperError(error) => {
                anyhow!("{doing}: the API server {server} cannot be reached: {}; {REACH}", innermost(&error))
            }
            other => anyhow!("{doing}: {other}"),
        }
    }
}

const REACH: &str = "check that address and the way to it, or name another context by --context";

/// What is said of what the API server refuses to who asks.
const ASK: &str = "ask a cluster administrator for that permission";

/// Whether a sentence says that the API server refused something to who asks for want of a permission.
pub(crate) fn is_refusal(sentence: &str) -> bool {
    sentence.contains(ASK)
}

/// What the API server answered, with what to do.
pub(crate) fn of_status(code: u16, message: &str) -> String {
    match code {
        401 => "the API server does not accept the kubeconfig's credentials; log in again, or name another context by --context"
            .to_owned(),
        403 => format!("{message}; {ASK}, or name another context by --context"),
        _ if message.is_empty() => format!("the API server answers {code} and says nothing"),
        _ => message.to_owned(),
    }
}

/// Why there is no kubeconfig to be had where none was named.
fn no_kubeconfig(error: KubeconfigError) -> anyhow::Error {
    match &error {
        KubeconfigError::ReadConfig(cause, _) if cause.kind() != ErrorKind::NotFound => {
            anyhow!("the kubeconfig cannot be read: {error}")
        }
        KubeconfigError::ReadConfig(..) | KubeconfigError::FindPath => {
            anyhow!("there is no kubeconfig: name one by --kubeconfig FILE or $KUBECONFIG, as kubectl takes it")
        }
        _ => anyhow!("the kubeconfig cannot be understood: {}", innermost(&error)),
    }
}

/// The cause that a person can do something about.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// A text as a part of a query.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// The resources of the kinds that we make.
const RESOURCES: &[(&str, &str)] = &[
    ("Namespace", "namespaces"),
    ("ConfigMap", "configmaps"),
    ("ResourceQuota", "resourcequotas"),
    ("ServiceAccount", "serviceaccounts"),
    ("ClusterRole", "clusterroles"),
    ("ClusterRoleBinding", "clusterrolebindings"),
    ("Role", "roles"),
    ("RoleBinding", "rolebindings"),
    ("Service", "services"),
    ("Deployment", "deployments"),
    ("PodDisruptionBudget", "poddisruptionbudgets"),
    ("DaemonSet", "daemonsets"),
    ("CustomResourceDefinition", "customresourcedefinitions"),
];

/// Where the objects of a kind of ours are.
pub(crate) fn collection(object: &Object) -> String {
    let resource = RESOURCES.iter().find(|(kind, _)| *kind == object.kind()).map_or("", |(_, resource)| resource);
    let api = match object.api_version() {
        "v1" => "/api/v1".to_owned(),
        version => format!("/apis/{version}"),
    };
    match object.namespace() {
        Some(namespace) => format!("{api}/namespaces/{namespace}/{resource}"),
        None => format!("{api}/{resource}"),
    }
}

/// Where an object of ours is.
pub(crate) fn path(object: &Object) -> String {
    format!("{}/{}", collection(object), object.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::{definitions, objects};
    use crate::values::Values;

    #[test]
    fn each_object_has_a_place_at_the_api_server() {
        let all: Vec<_> = objects(&Values::default()).into_iter().chain(definitions()).collect();
        for object in &all {
            assert!(!path(object).contains("//"), "{}", path(object));
        }
        assert!(all.iter().any(|it| path(it) == "/apis/apps/v1/namespaces/justmtls-system/daemonsets/justmtls-node"));
        assert!(all.iter().any(|it| path(it) == "/api/v1/namespaces/justmtls-system"));
        assert!(all.iter().any(|it| path(it)
            == "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/peerauthentications.security.istio.io"));
    }

    #[test]
    fn refusals_say_what_to_do() {
        assert!(of_status(401, "Unauthorized").contains("log in again"));
        let forbidden = of_status(403, "pods is forbidden: User \"a\" cannot list resource \"pods\"");
        assert!(forbidden.contains("cannot list") && is_refusal(&forbidden));
        assert!(!is_refusal(&of_status(401, "Unauthorized")));
        assert_eq!(of_status(500, ""), "the API server answers 500 and says nothing");
    }

    #[test]
    fn a_token_to_go_on_with_is_encoded() {
        assert_eq!(encoded("a+b/c="), "a%2Bb%2Fc%3D");
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn a_kubeconfig_that_is_not_there_and_a_context_that_it_does_not_have_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config");
        let place =
            |context: Option<&str>| Place { kubeconfig: Some(file.clone()), context: context.map(str::to_owned) };
        let why = |context| {
            run(Cluster::connect(&place(context))).err().map(|error| format!("{error:#}")).unwrap_or_default()
        };
        assert!(why(None).contains("--kubeconfig") && why(None).contains("cannot be read"), "{}", why(None));
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: a\ncontexts: [{name: a, context: {cluster: a, user: a}}]\n\
                    clusters: [{name: a, cluster: {server: 'http://127.0.0.1:1'}}]\nusers: [{name: a, user: {}}]\n";
        std::fs::write(&file, text).unwrap();
        assert!(
            why(Some("b")).contains("--context b: the kubeconfig has no such context; it has a"),
            "{}",
            why(Some("b"))
        );
        let unreachable = run(async { Cluster::connect(&place(None)).await.unwrap().version().await.unwrap_err() });
        let unreachable = unreachable.to_string();
        assert!(
            unreachable.contains("http://127.0.0.1:1") && unreachable.contains("cannot be reached"),
            "{unreachable}"
        );
    }

    #[test]
    fn a_kubeconfig_that_is_there_and_of_no_use_is_not_said_to_be_missing() {
        let said = |kind: ErrorKind| no_kubeconfig(KubeconfigError::ReadConfig(kind.into(), "/x".into())).to_string();
        assert!(said(ErrorKind::NotFound).starts_with("there is no kubeconfig: name one"));
        assert!(said(ErrorKind::PermissionDenied).starts_with("the kubeconfig cannot be read: "));
        let unclear = no_kubeconfig(KubeconfigError::CurrentContextNotSet).to_string();
        assert!(unclear.starts_with("the kubeconfig cannot be understood: "), "{unclear}");
    }
}
