//! Tasks that run as long as the gateway does. The supervisor reports the name of any task that
//! ends.

use std::collections::HashMap;
use std::future::Future;

use tokio::task::{Id, JoinSet};

use crate::store::admin::{Poll, poll_every};

/// Named tasks, aborted when this is dropped.
#[derive(Debug, Default)]
pub struct Supervisor {
    tasks: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

#[derive(Debug, thiserror::Error)]
#[error("the task {name:?} ended unexpectedly: {reason}")]
pub struct TaskEnded {
    pub name: &'static str,
    pub reason: String,
}

impl Supervisor {
    /// Starts a task that must not end by itself.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(task).id();
        self.names.insert(id, name);
    }

    pub fn spawn_poller<P: Poll + 'static>(&mut self, poller: P) {
        self.spawn(P::TASK, poll_every(poller));
    }

    /// Waits until a task has ended or panicked; never returns if there are no tasks.
    ///
    /// # Cancel safety
    /// A cancelled call loses nothing.
    pub async fn ended(&mut self) -> TaskEnded {
        let (id, reason) = match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => (id, "it returned".to_owned()),
            Some(Err(error)) => (error.id(), error.to_string()),
            None => return std::future::pending().await,
        };
        let name = self.names.remove(&id).unwrap_or_default();
        TaskEnded { name, reason }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_named() {
        let mut supervisor = Supervisor::default();
        supervisor.spawn("steady", pending());
        supervisor.spawn("broken", async { panic!("a reason") });
        let ended = supervisor.ended().await.to_string();
        assert!(
            ended.contains("\"broken\"") && ended.contains("a reason"),
            "{ended}"
        );
    }

    #[tokio::test]
    async fn a_task_that_returns_is_named() {
        let mut supervisor = Supervisor::default();
        supervisor.spawn("steady", pending());
        supervisor.spawn("lazy", async {});
        assert_eq!(supervisor.ended().await.name, "lazy");
    }
}
