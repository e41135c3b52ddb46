// Keeps the page current: the numbers by a stream of server-sent events, and the parts with `data-refresh` (seconds) by
// loading them again. Without this file, the page works and shows the time at which it was loaded.
"use strict";

// Adds the time in the zone of the browser.
function addLocalTimes(root) {
  const zone = new Intl.DateTimeFormat(undefined, {
    month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", timeZoneName: "short",
  });
  for (const time of root.querySelectorAll("time[datetime]:not([data-local])")) {
    const at = new Date(time.dateTime);
    time.dataset.local = "";
    if (isNaN(at)) continue;
    if (time.title) {
      time.title += ` (${zone.format(at)})`;
    } else {
      const local = document.createElement("span");
      local.className = "local";
      local.textContent = ` (${zone.format(at)})`;
      time.append(local);
    }
  }
}

// Whether each source of updates works; a source is missing until its first answer.
const works = new Map();

function report(source, isWorking) {
  works.set(source, isWorking);
  const text = [...works.values()].every(Boolean)
    ? "Updates are live."
    : "Could not update: the gateway or its store does not answer. The numbers are old.";
  const connection = document.getElementById("connection");
  if (connection.textContent !== text) connection.textContent = text;
}

const numbers = document.querySelectorAll("[data-live]");

function listen() {
  const events = new EventSource("/live");
  events.onerror = () => {
    report("numbers", false);
    // A browser reconnects after a lost connection, but not after a refusal.
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 10_000);
  };
  events.onmessage = (event) => {
    const values = JSON.parse(event.data);
    report("numbers", values.failed === undefined);
    for (const element of numbers) {
      const value = values[element.dataset.live];
      if (value !== undefined && element.textContent !== value) element.textContent = value;
    }
  };
}

// Does not replace what a person uses: a part with the focus or with selected text.
function isInUse(part) {
  const selection = getSelection();
  return part.contains(document.activeElement) || (!selection.isCollapsed && part.contains(selection.anchorNode));
}

// Loads the elements of a part again and again, each time after the answer to the last request.
async function refresh(part, elements) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * Number(elements[0].dataset.refresh)));
    if (document.hidden || elements.every(isInUse)) continue;
    try {
      const address = new URL(location.href);
      if (part) address.searchParams.set("part", part);
      const answer = await fetch(address, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const element of elements) {
        const fresh = page.getElementById(element.id);
        if (fresh && !isInUse(element)) {
          element.replaceChildren(...fresh.childNodes);
          addLocalTimes(element);
        }
      }
      report(part, true);
    } catch {
      report(part, false);
    }
  }
}

addLocalTimes(document);
if (numbers.length > 0) listen();
const parts = new Map();
for (const element of document.querySelectorAll("[data-refresh]")) {
  const part = element.dataset.part ?? "";
  parts.set(part, [...(parts.get(part) ?? []), element]);
}
for (const [part, elements] of parts) refresh(part, elements);
