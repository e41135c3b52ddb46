// Keeps the page current: the numbers by a stream of server-sent events, and the parts with `data-refresh` (seconds) by
// loading the page again. Without this file, the page works and shows the time at which it was made.
"use strict";

const connection = document.getElementById("connection");

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

function say(text) {
  if (connection.textContent !== text) connection.textContent = text;
}

const numbers = document.querySelectorAll("[data-live]");
if (numbers.length > 0) {
  const events = new EventSource("/live");
  events.onopen = () => say("Updates are live.");
  events.onerror = () => say("No connection to the gateway; the page shows old numbers.");
  events.onmessage = (event) => {
    const values = JSON.parse(event.data);
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

const due = new Map();
for (const part of document.querySelectorAll("[data-refresh]")) {
  due.set(part, Date.now() + 1000 * Number(part.dataset.refresh));
}

async function refresh() {
  const parts = [...due].filter(([part, at]) => at <= Date.now() && !isInUse(part)).map(([part]) => part);
  if (document.hidden || parts.length === 0) return;
  for (const part of parts) due.set(part, Date.now() + 1000 * Number(part.dataset.refresh));
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of parts) {
      const fresh = page.getElementById(part.id);
      if (fresh && !isInUse(part)) {
        part.replaceChildren(...fresh.childNodes);
        addLocalTimes(part);
      }
    }
    if (numbers.length === 0) say("Updates are live.");
  } catch {
    say("No connection to the gateway; the page shows old numbers.");
  }
}

addLocalTimes(document);
if (due.size > 0) setInterval(refresh, 1000);
