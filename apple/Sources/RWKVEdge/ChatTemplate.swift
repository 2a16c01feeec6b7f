import Foundation

/// How a model was taught to chat: docs/bundle.md, "Chat templates".
public struct ChatTemplate: Decodable, Sendable, Equatable {
    public let system: String
    public let user: String
    public let assistant: String
    public let turnEnd: String
    /// Texts that end a reply: give them to `generate`.
    public let stop: [String]
    /// Ways of answering; `none` is always there.
    public let think: [String: Thinking]

    public struct Thinking: Decodable, Sendable, Equatable {
        /// What the reply is made to begin with.
        public let opening: String
        /// Of this way of answering; nil for the bundle's.
        public let sampling: Sampling?
    }

    enum CodingKeys: String, CodingKey {
        case system, user, assistant, stop, think
        case turnEnd = "turn_end"
    }

    /// Give the text to read before the model answers.
    ///
    /// - Parameters:
    ///   - message: what a person says
    ///   - system: what the model is told at the start; nil later on
    ///   - isFirst: whether nothing was said before
    ///   - thinking: one of `think`
    public func turn(_ message: String, system: String? = nil, isFirst: Bool, thinking: String = "none") throws -> String {
        guard let way = think[thinking] else {
            let known = think.keys.sorted().joined(separator: ", ")
            throw RWKVError.input("The way of thinking \(thinking) is unknown: the bundle has \(known).")
        }
        var text = isFirst ? "" : turnEnd
        if isFirst, let system {
            text += Self.fill(self.system, system)
        }
        return text + Self.fill(user, message) + assistant + way.opening
    }

    /// Blank lines end turns, so in what a person says each is one newline.
    private static func fill(_ template: String, _ message: String) -> String {
        let lines = message.components(separatedBy: .newlines).map { $0.trimmingCharacters(in: .whitespaces) }
        let text = lines.filter { !$0.isEmpty }.joined(separator: "\n")
        return template.replacingOccurrences(of: "{}", with: text)
    }
}
