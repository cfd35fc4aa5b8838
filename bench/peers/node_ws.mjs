// Node with the `ws` package, compression off (its default).

import { WebSocket, WebSocketServer } from "ws";
import { answer } from "./work.mjs";

const server = new WebSocketServer({ host: "127.0.0.1", port: Number(process.argv[2]), path: "/ws" });

server.on("connection", (client) => {
  client.on("message", (message) => {
    const [envelope, news] = answer(JSON.parse(message));
    if (news) broadcast(JSON.stringify(news));
    client.send(JSON.stringify(envelope));
  });
  client.on("error", () => {});
});

function broadcast(text) {
  for (const client of server.clients) {
    if (client.readyState === WebSocket.OPEN) client.send(text);
  }
}
