import Foundation

/// How a model was taught to chat: docs/bundle.md, "Chat templates".
public struct ChatTemplate: Decodable, Sendable, Equatable {
    public let system: String
    public let user: String
    public let assistant: String
    public let turnEnd: String
    /// Texts that end a reply: give them to `generate`.
    public let stop: [String]
    /// What becomes of blank lines in a message.
    public let blankLines: BlankLines
    /// Ways of answering; `none` is always there.
    public let think: [String: Thinking]

    public struct Thinking: Decodable, Sendable, Equatable {
        /// What the reply is made to begin with.
        public let opening: String
        /// Of this way of answering; nil for the bundle's.
        public let sampling: Sampling?
    }

    public enum BlankLines: String, Decodable, Sendable {
        /// They stay: the template's turns end otherwise.
        case keep
        /// They would end the turn: a run of them becomes one line break.
        case collapse
    }

    enum CodingKeys: String, CodingKey {
        case system, user, assistant, stop, think
        case turnEnd = "turn_end"
        case blankLines = "blank_lines"
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
        if isFirst, let system, !system.isEmpty {
            text += Self.fill(self.system, system)
        }
        return text + Self.fill(user, message) + assistant + way.opening
    }

    /// Blank lines end turns, so in what a person says each is one newline. Character by character of Unicode, as Python's runtime.
    private static func fill(_ template: String, _ message: String) -> String {
        let lines = message.unicodeScalars.split { $0 == "\n" || $0 == "\r" }.map { line in
            String(String.UnicodeScalarView(line.drop(while: isSpace).reversed().drop(while: isSpace).reversed()))
        }
        return template.replacingOccurrences(of: "{}", with: lines.filter { !$0.isEmpty }.joined(separator: "\n"))
    }

    /// What Python's `str.strip` takes away: the separators of ASCII besides Unicode's white space.
    private static func isSpace(_ scalar: Unicode.Scalar) -> Bool {
        scalar.properties.isWhitespace || (0x1C...0x1F).contains(scalar.value)
    }
}
