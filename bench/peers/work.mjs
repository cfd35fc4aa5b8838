// What the Node peers do with a request: the same as work.py.

const started = new Date().toISOString();
const state = { state: "running", detail: "", since: started };

/** Returns the envelope for the client that asked, and one for all clients or null. */
export function answer({ method, params, id }) {
  if (method === "get_status") {
    return [{ type: "status_update", data: { vision: state, language: state, command: state }, id }, null];
  }
  if (method !== "execute_command") return [error("unknown_method", method, id), null];
  const line = params.command;
  const blank = line.indexOf(" ");
  const command = line.slice(0, blank);
  const text = line.slice(blank + 1);
  const response = { type: "command_response", data: { command: line, result: text }, id };
  if (command === "echo") return [response, null];
  if (command === "notify") return [response, notification(text)];
  return [error("unknown_command", line, id), null];
}

function notification(message) {
  return { type: "notification", data: { message, level: "info", time: new Date().toISOString() } };
}

function error(code, message, id) {
  return { type: "error", data: { code, message }, id };
}
